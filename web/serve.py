"""The guide's front door: ``python -m web.serve``, or ``gunicorn -w 4 -b 0.0.0.0:5000 web.serve:app``.

MODEL_CHECKPOINT, HOST and PORT say what is served and where; docs/settings.md has the rest. Importing this module
starts nothing.
"""

if __name__ == "__main__":
    from nanogpt.web.server import serve

    serve()
else:
    from nanogpt.web import create_app

    app = create_app()
