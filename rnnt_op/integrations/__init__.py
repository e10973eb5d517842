"""The loss under the names, arguments and conventions of other packages, a module for each."""
