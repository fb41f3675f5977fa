"""Publish every policy of the zoo under one Hub organisation: each folder of zoo/ as <organisation>/<folder's name>.

  python zoo/tools/publish.py my-org              # checks that every folder loads; uploads nothing
  python zoo/tools/publish.py my-org --upload     # uploads, one commit per repository; log in with `hf auth login` or HF_TOKEN

A repository with identical files gets no new commit, so the command can be repeated after a failure.
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import diffagents  # noqa: E402
from diffagents import registry  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organisation", help="Organisation or user on the Hub.")
    parser.add_argument("--upload", action="store_true", help="Upload; without this option nothing leaves this machine.")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="Only policies whose name contains one of these texts."
    )
    parser.add_argument("--private", action="store_true", default=None, help="Create private repositories.")
    parser.add_argument("--zoo", type=pathlib.Path, default=ROOT / "zoo", help="Folder of policies. Default: zoo/.")
    args = parser.parse_args()

    folders = [path.parent for path in sorted(args.zoo.glob("*/config.json"))]
    folders = [folder for folder in folders if not args.only or any(text in folder.name for text in args.only)]
    if not folders:
        print(f"there is no policy in {args.zoo}", file=sys.stderr)
        return 1
    failed = 0
    for folder in folders:
        repo_id = f"{args.organisation}/{folder.name}"
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        try:
            if args.upload:
                print(f"{registry.push_folder(folder, repo_id, private=args.private).commit_url} ({size:.1f} MB)", flush=True)
            else:
                agent = diffagents.load(folder, device="cpu", verbose=0)
                print(f"would push {folder.name} to {repo_id}: {type(agent).__name__}, {size:.1f} MB", flush=True)
        except (OSError, ValueError) as error:  # a failure does not stop the others
            failed += 1
            print(f"{repo_id}: {error}", file=sys.stderr)
    if not args.upload:
        print(f"{len(folders)} policies; nothing was uploaded: add --upload")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
