"""``nanogpt bench``: load for a server (``load``, ``capacity``), and the speed of a model by itself (``model``).

The load generator runs in the command's own process: one asyncio loop, plain sockets, no HTTP library, because its
processor time is taken from the server that it measures where both share a machine. It speaks to any server with
OpenAI's routes. Importing this package loads neither NumPy nor PyTorch; only ``model`` needs them.
"""
