"""`phimini push`: a stage's model, with its card, to a repository of the Hugging Face Hub."""

import os
from pathlib import Path

from phimini.model.io.checked_files import read_sealed
from phimini.stages.config.options import PushOptions
from phimini.stages.publish.card import write_card
from phimini.stages.run.outputs import SUMMARY, check_outputs

TOKEN = "HF_TOKEN"
"""the environment variable with the Hub's key; no other place is read"""


def push(verb: str, settings: PushOptions) -> int:
    """Write the card, and send the model's files; offline, or with `--dry-run`, only list them.

    Raises ValueError for a folder that is no complete stage, a damaged file, a name that the Hub does not allow, or no token;
    ConnectionError with the Hub's words if it refuses.
    """
    import httpx2  # late: only this verb needs the Hub's client
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    if settings.repo is None or settings.repo.count("/") != 1:
        raise ValueError(f"{verb}: expected repo=OWNER/NAME, got {settings.repo!r:.100}")
    validate_repo_id(settings.repo)
    stage = Path(settings.model)
    files = files_of(stage)
    token = os.environ.get(TOKEN)
    offline = settings.dry_run or is_offline_mode()
    if not token and not offline:
        raise ValueError(f"{verb}: expected the Hub's token in the environment variable {TOKEN}")
    api = HfApi(token=token or False)
    where = f"{api.endpoint}/{settings.repo}"
    if offline:
        return listed(files, f"nothing is sent: {'--dry-run' if settings.dry_run else 'offline'}; it would go to {where}")  # fmt: skip
    try:
        api.create_repo(settings.repo, private=not settings.public, exist_ok=True)
        done = api.upload_folder(
            repo_id=settings.repo, folder_path=stage / "model", allow_patterns=[file.name for file in files],
            commit_message=f"{stage.name} of {stage.resolve().parent.name}",
        )  # fmt: skip
    except (httpx2.TransportError, OfflineModeIsEnabled) as error:
        return listed(files, f"nothing is sent: the Hub cannot be reached ({error}); it would go to {where}")  # fmt: skip
    except HfHubHTTPError as error:
        said = " ".join(str(error).split())
        raise ConnectionError(f"{verb}: {where}: {said:.300}") from error
    return listed(files, f"sent: {done.commit_url}")


def files_of(stage: Path) -> list[Path]:
    """Return the files of a stage's model with a new card. Raises ValueError as `write_card`, and for a damaged file."""
    card = write_card(stage)
    check_outputs(stage)
    known = (stage / name for name in read_sealed(stage / SUMMARY)["files"])
    return sorted({card, *(path for path in known if path.parent == stage / "model")})


def listed(files: list[Path], line: str) -> int:
    """Print the files with their sizes, and a line."""
    for file in files:
        print(f"{file.stat().st_size:>15,} bytes  {file.name}")
    print(f"{sum(file.stat().st_size for file in files):>15,} bytes in {len(files)} files\n{line}")
    return 0
