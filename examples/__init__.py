"""Example programs of rnnt_op."""
