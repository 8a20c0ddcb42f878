"""The guide's front door: ``python -m web.serve``, or ``gunicorn -w 4 -b 0.0.0.0:5000 web.serve:app``.

MODEL_CHECKPOINT, HOST and PORT say what is served and where; docs/settings.md has the rest. ``python -m web.serve`` is
``nanogpt serve`` and takes its flags. Importing this module starts nothing.
"""

import sys

if __name__ == "__main__":
    from nanogpt.cli import main

    sys.exit(main(["serve", *sys.argv[1:]]))
else:
    from nanogpt.web import create_app

    app = create_app()
