"""``python -m benchmarks.http``: concurrent streams over HTTP, against the engine alone. See README.md."""
