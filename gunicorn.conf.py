"""Read by gunicorn unasked when it is started in this folder: threads, engine start and stop, logs.

Flags of gunicorn's own command line (-w, -b, --timeout) go above what is set here.
"""

from nanogpt.web.gunicorn_hooks import configuration, load_settings

globals().update(configuration(load_settings()))
