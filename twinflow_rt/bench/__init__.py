"""Measuring: latency, memory, throughput and their ceilings, with a correctness check in the same run."""
