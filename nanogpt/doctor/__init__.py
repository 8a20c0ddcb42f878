"""``nanogpt doctor``: what stands between a model and a service that one can rely on, as a list of checks.

A check is a function whose name is the check's (``findings.check``); each looks at one thing and yields findings. Those
of ``machine``, ``checkpoint`` and ``configuration`` look at this machine and at the settings that ``nanogpt serve``
would start with; those of ``live`` and ``proxy`` ask a running service over HTTP, as a client would, through whatever
stands in front of it. ``checklist`` puts the latter together into the deployment guide's eight boxes.

Runs in the command's own process, in one thread. Changes nothing: no file is written but the runner's cache of packed
weights, and a live service is asked for short texts only.
"""
