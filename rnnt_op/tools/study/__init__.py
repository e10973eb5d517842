"""Measuring transducer losses: problems, a correctness gate, time, memory, and reports of them."""
