"""Docker's HEALTHCHECK: exit 0 if the server in this container answers /health with 200.

http.client and not urllib: a container often inherits HTTP_PROXY, and the question is not the proxy's to answer.
"""

import http.client
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("PORT") or 5000), timeout=4)
try:
    connection.request("GET", "/health")
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
except OSError as error:
    sys.exit(f"No answer: {error}")
print(text)  # docker inspect shows it
sys.exit(answer.status != 200)
