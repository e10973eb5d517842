"""The loss under the names, arguments and conventions of other packages, a module for each.

None of them is imported with ``rnnt_op``. ``docs/integrations.md`` has an example of each.
"""
