"""The shell commands that a page shows, one by one: which are run, and how they are translated for a test machine.

``test_shell_blocks.py`` runs them. A command of a page is one of three things:

- behind ``<!-- test -->`` on a page of ``MARKED_ELSEWHERE``: another test runs it;
- listed in ``NOT_HERE`` with the reason why no test can run it;
- run: as a server that the following commands talk to, or to its end. Only programs of ``PROGRAMS`` are run, so that a
  new page cannot make the tests do what nobody looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from support import ROOT

MARKED_ELSEWHERE = {
    "README.md": "tests/docs/test_quickstart.py",
    "docs/quickstart.md": "tests/docs/test_quickstart.py",
    "docs/training.md": "tests/train/test_page.py",
}

# (page or *, the command's beginning as a regular expression, why no test can run it). Stale entries are errors.
NOT_HERE = [
    ("README.md", "make test", "it is what runs this test"),
    ("docs/training.md", "git clone", "the repository is here"),
    ("docs/training.md", "make install", "tests/packaging installs the package"),
    ("docs/training.md", r"\.venv/bin/pip install", "it needs the network"),
    ("docs/training.md", r"\.venv/bin/nanogpt prepare hf", "it needs the network"),
    ("docs/training.md", "torchrun", "it takes eight devices and days; tests/train runs two processes"),
    ("docs/openai-api.md", "pip install", "it needs the network"),
    (
        "docs/openai-api.md",
        "lm_eval",
        "it downloads its data; tests/http/test_lm_eval.py runs it with data that is here",
    ),
    (
        "*",
        'python -c "import torch',
        "it is PyTorch's own, and takes seconds; tests/unit/test_create_runner.py has ours",
    ),
    ("*", "htop", "it is interactive"),
    ("*", "nvidia-smi", "there is no GPU"),
    ("*", "netstat", "net-tools is not part of every system"),
    ("docs/deployment.md", "docker ", "no Docker engine; `make image-test` builds and runs the image"),
    ("docs/deployment.md", r"cp \.env\.example", "it is for Compose"),
    ("docs/deployment.md", "(?:cp|sed|nginx) .*nginx", "tests/services/test_nginx.py types it"),
    ("docs/deployment.md", "nginx -t", "tests/services/test_nginx.py types it"),
    ("docs/deployment.md", "(?:useradd|systemctl|install -|sed .*API_KEY)", "tests/services/test_systemd.py types it"),
    ("docs/deployment.md", "(?:python3 -m venv /opt|/opt/.*pip)", "it needs the network"),
    ("docs/deployment.md", "(?:kubectl|password=)", "there is no cluster; tests/packaging checks what is applied"),
    ("docs/deployment.md", "(?:pip install 'nano-gpt-api|serve run)", "tests/services/test_ray.py serves with Ray"),
    ("docs/ray.md", "(?:pip install 'nano-gpt-api|serve run)", "tests/services/test_ray.py serves with Ray"),
    ("docs/ray.md", "(?:pip install vllm|vllm serve)", "vLLM is no dependency; tests/parity loads what is converted"),
    ("*", "nanogpt bench serve .*--find-capacity", "it takes minutes; tests/http/test_bench_serve.py has short trials"),
    ("docs/benchmarking.md", r"python -m benchmarks\.peer_load", "guidellm is installed apart, and it takes minutes"),
    ("*", "nanogpt doctor .*your-domain", "it is somebody's domain; tests/services/test_doctor_live.py has its own"),
    ("*", "install -m 600 -o prometheus", "it gives a file to another user of the system"),
]

PROGRAMS = {"cat", "cp", "curl", "grep", "gunicorn", "make", "nanogpt", "pip", "printf", "python", "ss"}

SERVER = re.compile(r"(?:python -m web\.serve|gunicorn .*web\.serve:app|nanogpt serve\b|make serve)")
_ASSIGNMENTS = re.compile(r"""^(?:[A-Z_]+=(?:"[^"]*"|'[^']*'|\S*)\s+)*""")
_BLOCK = re.compile(
    r"^(?P<mark><!-- test[^\n]*-->\n)?(?P<indent> *)```(?P<language>bash|python)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Command:
    """One command of a page, as it stands there."""

    page: str
    text: str
    marked: bool

    @property
    def programs(self) -> set[str]:
        """What it calls, also behind pipes and ``&&``."""
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "''", self.text.partition("<<")[0].replace("\\\n", " "))
        parts = [_ASSIGNMENTS.sub("", part.strip()) for part in re.split(r"&&|\|\||\||;", bare)]
        return {part.split()[0].removeprefix(".venv/bin/") for part in parts if part}

    @property
    def serves(self) -> bool:
        return bool(SERVER.match(self.form.removeprefix(".venv/bin/")))

    @property
    def asks_a_server(self) -> bool:
        """It talks to whatever server the page started before it."""
        return "http://localhost:" in self.text or bool(re.match(r"nanogpt (?:reload|rollback|models)\b", self.form))

    @property
    def form(self) -> str:
        """The command without the variables in front of it."""
        return _ASSIGNMENTS.sub("", self.text)

    @property
    def run_elsewhere(self) -> bool:
        return self.marked and self.page in MARKED_ELSEWHERE

    @property
    def why_not(self) -> str | None:
        """The reason of the list, for a command that no test can run."""
        for page, beginning, reason in NOT_HERE:
            if page in ("*", self.page) and re.match(beginning, self.form):
                return reason
        return None


def commands(page: str) -> list[Command]:
    """The commands of a page's ``bash`` blocks, in order, without comments."""
    found = []
    for block in _BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")):
        if block["language"] == "bash":
            code = re.sub(f"^{block['indent']}", "", block["code"], flags=re.M)
            found += [Command(page, text, bool(block["mark"])) for text in split(code)]
    return found


def python_program(page: str) -> str:
    """The page's ``python`` blocks as one program."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(block["code"] for block in _BLOCK.finditer(text) if block["language"] == "python")


def split(code: str) -> list[str]:
    """A block's commands: lines, with what a backslash or a here-document joins to them."""
    found: list[str] = []
    lines = iter(code.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        command = line
        while command.endswith("\\"):
            command += "\n" + next(lines)
        if here := re.search(r"<<-?\s*'?(\w+)'?", command.replace("<<<", "")):
            for more in lines:
                command += "\n" + more
                if more.strip() == here[1]:
                    break
        found.append(re.sub(r"\s+# .*$", "", command) if "\n" not in command else command)
    return found


def translated(command: str, *, url: str, redis_url: str, folder: Path, bin_folder: Path) -> str:
    """The command as it is run here. Everything in which that differs from the page stands in this function.

    Servers get a free port of the loopback (0), clients are told which; four workers are one (tests/http/test_guide.py
    starts all four); Redis is the test's own, files of the system lie in the test's folder, and nothing is installed.
    """
    rules = [
        (r"\.venv/bin/", f"{bin_folder}/"),
        (r"(?:0\.0\.0\.0|127\.0\.0\.1):5000", "127.0.0.1:0"),
        (r"--host 0\.0\.0\.0", "--host 127.0.0.1"),
        (r"\bPORT=\d+", "PORT=0"),
        (r"--duration 30", "--duration 1"),
        (r"--batches 1,4,16,32", "--batches 1"),
        (r"log/model_[35]0000\.pt", "log/model_40000.pt"),
        (r"-w 4 ", "-w 1 "),
        (r"--port \d+", "--port 0"),
        (r"http://localhost:(?:5000|8080)", url),
        (r"(\bnanogpt (?:reload|rollback|models)\b(?!.*--url).*)", rf"\1 --url {url}"),
        (r"redis://(?:localhost|cache):6379/0", redis_url),
        (r"(?<= )/etc/", f"{folder}/etc/"),
        (r'"prompt\d"', '"prompt"'),  # the model here is one of characters, and knows no digits
        (r"\bmake serve", f"make -s -o install serve BIN={bin_folder}"),
        (r"\bpip install\b", "python -m pip install --dry-run --no-index -q"),
        (r"^ss (.*)\| grep 5000$", r"ss \1"),
    ]
    for pattern, replacement in rules:
        command = re.sub(pattern, replacement, command)
    return command
