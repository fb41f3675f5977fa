"""Build the wheel and the source distribution of the last commit into dist/, and check both with twine.

  make dist                                           # to try them
  make dist URL=https://example.org/me/diffagents     # for an index: its page has no files next to README.md

Only committed files are used, so that neither a stale build nor a file that lies about can get in; dist/ is emptied first. The
wheel is built from the source distribution, which is thereby known to be complete. Needs the packages build, setuptools and
twine, which `make dist` installs in an environment of their own.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
CLONE_FROM = "URL-OF-THIS-REPOSITORY"
"""What README.md says as long as the repository has no address."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="Address of the repository. Default: none; links of README.md stay relative.")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "dist", help="Where to write. Default: dist/.")
    args = parser.parse_args()
    if args.url is not None and not re.fullmatch(r"https://[^\s?#]+", args.url):
        sys.exit(f"--url {args.url!r} is not the address of a repository: it begins with https:// and has no query")

    args.out.mkdir(parents=True, exist_ok=True)
    for old in (*args.out.glob("*.whl"), *args.out.glob("*.tar.gz")):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch) / "source"
        last_commit(source)
        if args.url:
            name_repository(source, args.url.rstrip("/"))
        seconds = output("git", "log", "-1", "--format=%ct").strip()
        environment = {**os.environ, "SOURCE_DATE_EPOCH": seconds}  # the same commit gives the same wheel
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(args.out.resolve()), str(source)]
        built = subprocess.run(command, env=environment, capture_output=True, text=True)
    if built.returncode:
        sys.exit(built.stdout + built.stderr)
    made = sorted((*args.out.glob("*.whl"), *args.out.glob("*.tar.gz")))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, made)], check=True)
    for path in made:
        print(f"{path.stat().st_size / 1000:6.0f} kB  {path.name}")
    if output("git", "status", "--porcelain"):
        print("Changes that are not committed are not in them.")
    if not args.url:
        print("The links of README.md are relative and lead nowhere on an index: for an upload, pass URL=https://...")


def output(*command: str) -> str:
    """What a command prints that is run in the checkout."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def last_commit(folder: pathlib.Path) -> None:
    """Write the files of the last commit to a new folder."""
    archive = folder.with_suffix(".zip")
    output("git", "archive", "--format=zip", f"--output={archive}", "HEAD")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)


def name_repository(folder: pathlib.Path, url: str) -> None:
    """Write the address of the repository into the files that an index shows: README.md and the metadata."""
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    ref = f"v{tomllib.loads(text)['project']['version']}"
    urls = f'[project.urls]\nRepository = "{url}"\nChangelog = "{url}/blob/{ref}/CHANGELOG.md"\n\n'
    project.write_text(text.replace("[project.scripts]", f"{urls}[project.scripts]"), encoding="utf-8")
    readme = folder / "README.md"
    readme.write_text(absolute_links(readme.read_text(encoding="utf-8"), url, ref), encoding="utf-8")


def absolute_links(text: str, url: str, ref: str) -> str:
    """Markdown in which relative links and pictures lead to the files of a tag of the repository.

    Args:
        text: The Markdown.
        url: Address of the repository, without a slash at its end.
        ref: The tag.
    """

    def absolute(match: re.Match[str]) -> str:
        picture, label, path = match.groups()
        return f"{picture}[{label}]({url}/{'raw' if picture else 'blob'}/{ref}/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, text).replace(CLONE_FROM, url)


if __name__ == "__main__":
    main()
