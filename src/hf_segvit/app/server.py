"""The server of the page, whose files are private and deleted when it ends.

The address is checked before models load. `serve` runs until the process is asked to stop; `running_app` runs beside
the caller. Nothing is sent anywhere: no analytics, no public link, no fonts or scripts from other hosts.
"""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.image_claims import MAX_PIXELS_VARIABLE

if TYPE_CHECKING:
    from .model_cache import ModelCache

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 7860
MAX_PIXELS = 50_000_000  # of an upload, unless the environment says another number
EXAMPLE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # what browsers show
MAX_EXAMPLES = 60


def serve(models: Sequence[str], classifier: str | None = None, **settings: Any) -> None:
    """Serve models until Ctrl-C or SIGTERM; arguments and errors as for `running_app`."""
    asked: list[int] = []
    with running_app(models, classifier, **settings) as address:
        previous = {
            number: signal.signal(number, lambda number, _: asked.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            print(f"the page is at {address}; Ctrl-C ends it", flush=True)
            # Not a lock or event: the system may hand the signal to another thread, which does not wake this one.
            while not asked:
                time.sleep(0.2)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def running_app(
    models: Sequence[str],
    classifier: str | None = None,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    keep: int = 2,
    label_mismatch: str = "error",
    examples: str | os.PathLike[str] | None = None,
    queue: int = 20,
    max_bytes: int = 20_000_000,
    **settings: Any,
) -> Iterator[str]:
    """Serve models while the block runs, and yield the page's address.

    Args:
        models: folders or Hub ids; the first is loaded now, the others when they are first asked for.
        classifier: folder or Hub id of a ViT-P, for points and relabelling.
        host: address to listen on; `127.0.0.1` is this machine only.
        port: 0 takes any that is free.
        keep, label_mismatch, settings: as for `ModelCache`.
        examples: folder of images to offer; `None`: generated scenes.
        queue: the most requests that may wait.
        max_bytes: of an upload. Its pixels are limited by HF_SEGVIT_MAX_PIXELS, by default to 50 million.

    Raises:
        ValueError: Gradio is missing, the address cannot be listened on, there are no examples, or the first model or
            the ViT-P cannot be loaded.
    """
    refuse_missing_gradio()
    port = free_port(host, port)
    from .model_cache import ModelCache  # imports PyTorch, which takes seconds

    # No other user of this machine may look into the folder, and Gradio's own default is shared by all its apps.
    with tempfile.TemporaryDirectory(prefix="hf-segvit-app-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        with _environment(
            GRADIO_TEMP_DIR=str(folder / "uploads"),
            GRADIO_ANALYTICS_ENABLED="False",
            GRADIO_RUN_HISTORY="False",
            **{MAX_PIXELS_VARIABLE: os.environ.get(MAX_PIXELS_VARIABLE) or str(MAX_PIXELS)},
        ):
            files = example_files(examples, folder / "examples")
            cache = ModelCache(models, classifier, keep=keep, label_mismatch=label_mismatch, **settings)
            _load_first(cache)
            # Imported here, as Gradio reads the environment when it is imported.
            import gradio as gr

            from .page import CSS, FONT, MONOSPACED, build_page

            page = build_page(cache, folder / "uploads", files, queue=queue)
            try:
                try:
                    page.launch(
                        server_name=host,
                        server_port=port,
                        share=False,
                        prevent_thread_lock=True,
                        quiet=True,
                        max_file_size=max_bytes,
                        ssr_mode=False,
                        pwa=False,
                        mcp_server=False,
                        enable_monitoring=False,
                        footer_links=["api"],
                        theme=gr.themes.Default(font=FONT, font_mono=MONOSPACED),
                        css=CSS,
                    )
                except OSError as error:  # somebody else was faster
                    raise ValueError(f"cannot listen on {host} port {port}: {error}; name another --port") from error
                yield f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
            finally:
                page.close(verbose=False)


def refuse_missing_gradio() -> None:
    """Refuse to begin without Gradio."""
    if find_spec("gradio") is None:
        raise ValueError('the page needs Gradio: pip install "hf-segvit[app]"')


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0; a ValueError if it cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, just after another ended
            listener.bind((host, port))
            return listener.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"cannot listen on {host} port {port}: {reason.lower()}; name another with --port, or --port 0 for any "
            "that is free"
        ) from error


def example_files(examples: str | os.PathLike[str] | None, folder: Path) -> list[Path]:
    """Images of a folder, or generated scenes written to `folder`."""
    if examples is not None:
        named = Path(examples).expanduser()
        found = sorted(path for path in named.glob("*") if path.suffix.lower() in EXAMPLE_SUFFIXES)
        if not found:
            raise ValueError(
                f"--examples {examples}: no such folder, or none of its files ends in {', '.join(EXAMPLE_SUFFIXES)}"
            )
        return found[:MAX_EXAMPLES]
    from PIL import Image

    from ..data.generated_scenes import GeneratedScenes

    folder.mkdir(parents=True)
    scenes = GeneratedScenes(4, "test", size=(192, 256))
    paths = [folder / f"scene-{index + 1}.png" for index in range(len(scenes))]
    for index, path in enumerate(paths):
        Image.fromarray(scenes[index]["image"]).save(path)
    return paths


def _load_first(cache: "ModelCache") -> None:
    """Load what is shown at first, so that a wrong folder or classes that do not fit end the command at once."""
    own = cache.segmenter()
    names = ", ".join(cache.names)
    print(f"{names} on {own.device_description}", file=sys.stderr)
    if cache.classifier is not None:
        cache.point_classifier()
        if cache.can_relabel():
            cache.segmenter(relabel=True)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables within a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
