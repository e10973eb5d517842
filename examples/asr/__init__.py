"""A small streaming transducer on spoken digit strings, trained with `rnnt_op.JointRNNTLoss`."""
