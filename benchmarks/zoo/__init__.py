"""Published detectors of mmdet3d, and what is judged of each: for benchmarks/zoo_coverage.py."""
