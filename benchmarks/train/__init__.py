"""Training side by side with karpathy/nanoGPT: ``python -m benchmarks.train --nanogpt PATH --text FILE``."""
