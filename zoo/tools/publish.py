"""Publish every policy of the zoo under one Hub organisation: each folder of zoo/ as <organisation>/<folder's name>.

  python zoo/tools/publish.py my-org              # shows what it would do, and whether every folder would load: uploads nothing
  python zoo/tools/publish.py my-org --upload     # does it, one commit a repository; `hf auth login` or HF_TOKEN first

A repository that has the same files gets no new commit, so the command can be given again after a failure.
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
    parser.add_argument("organisation")
    parser.add_argument("--upload", action="store_true", help="without it nothing leaves this machine")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="policies whose name contains one of these")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--zoo", type=pathlib.Path, default=ROOT / "zoo", help="another folder of policies")
    args = parser.parse_args()

    folders = [path.parent for path in sorted(args.zoo.glob("*/config.json"))]
    folders = [folder for folder in folders if not args.only or any(text in folder.name for text in args.only)]
    if not folders:
        print(f"no policy in {args.zoo}", file=sys.stderr)
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
        except (OSError, ValueError) as error:  # a policy that fails stops no other
            failed += 1
            print(f"{repo_id}: {error}", file=sys.stderr)
    if not args.upload:
        print(f"{len(folders)} policies; nothing was uploaded: add --upload")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
