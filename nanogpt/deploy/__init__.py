"""Serving on more than one machine, with Ray Serve (the extra ``ray``). Everything else that deploys is in deploy/.

``ray`` is what ``serve run`` imports; ``replica`` and ``front`` are what it starts. Importing the package alone imports
no Ray.
"""
