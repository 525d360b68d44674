"""Find a font that has the letters of a text, among those of the system.

`font_of(text, size)` gives the font named by `use_font` or the environment variable HF_SEGVIT_FONT, else the one that
comes with Pillow, else a font of the system: fontconfig is asked, then the usual folders are searched. If no font has
all letters, `drawable` gives something else to draw, and a notice says once how to get one.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from ..lookup import printable

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

VARIABLE = "HF_SEGVIT_FONT"
_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "~/AppData/Local/Microsoft/Windows/Fonts",
)
_SUFFIXES = (".ttf", ".otf", ".ttc")
# Parts of the names of fonts with many scripts, which are tried first.
_LIKELY = ("notosanscjk", "sourcehansans", "arialuni", "unifont", "pingfang", "msyh", "malgun", "yugoth", "notosans")
LONGEST_TEXT = 120  # characters; the font is searched, and the text measured, letter by letter
_MAX_FILES = 600  # fonts opened in a search; each takes about a millisecond
_MISSING = "\uffff"  # no character, so that every font shows the sign for missing ones

_LOCK = threading.Lock()
_noticed: list[str] = []  # scripts that were said to have no font; the notice comes once a process

logger = logging.getLogger(__name__)


def use_font(path: str | os.PathLike[str] | None) -> None:
    """Draw names with a font file from now on; `None`: choose automatically. A file that is no font is a ValueError."""
    if path is not None:
        _opened(Path(path), 12, "the font")
        os.environ[VARIABLE] = str(path)  # also for processes that are started later
    else:
        os.environ.pop(VARIABLE, None)


def font_of(text: str, size: float) -> Font:
    """A font for a text in pixels of the letters' height; a new object each time, as fonts are not for threads."""
    default = ImageFont.load_default(size)
    chosen = os.environ.get(VARIABLE)
    if chosen:
        font = _opened(Path(chosen), size, VARIABLE)
        if _has(font, text):
            return font
    if _default_has("".join(sorted({letter for letter in text if not letter.isascii()}))):
        return default
    path = _system_font("".join(sorted(set(text))))
    return default if path is None else ImageFont.truetype(path, size)


def shortened(text: str, most: int = LONGEST_TEXT) -> str:
    """A text on one line, its control characters escaped, cut with an ellipsis where nobody would read on."""
    line = printable(" ".join(text[: 4 * most].split()))
    return line if len(line) <= most and len(text) <= 4 * most else line[: most - 1].rstrip() + "…"


def drawable(text: str, substitute: str) -> str:
    """The text, or what to draw instead if no font has its letters: it without accents, else the substitute.

    The first time that the substitute is needed, a notice says so.
    """
    if text.isascii() or _has(font_of(text, 12), text):
        return text
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    if plain.isascii():
        return plain
    _notice(_scripts(text))
    return substitute


def _notice(scripts: str) -> None:
    with _LOCK:  # images are drawn in threads
        if _noticed:
            return
        _noticed.append(scripts)
    logger.warning(
        f"no font here has the letters of some class names ({scripts}), so drawings show label ids instead; install a "
        f"font such as Noto, or name a font file with {VARIABLE}=FILE or `hf-segvit segment --font FILE`"
    )


def _scripts(text: str) -> str:
    """The scripts of a text for a message, such as "CJK, DEVANAGARI"."""
    words = {unicodedata.name(letter, "unknown").split()[0] for letter in text if not letter.isascii()}
    return ", ".join(sorted(words))


def _opened(path: Path, size: float, what: str) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path.expanduser(), size)
    except OSError as error:
        raise ValueError(
            f"{what} {path} cannot be opened as a font ({error}); name a .ttf, .otf or .ttc file"
        ) from error


def _has(font: Font, text: str) -> bool:
    """Whether a font has all letters of a text."""
    if text.isascii():
        return True
    try:
        missing = _image(font, _MISSING)
        # Blanks and marks that only steer the layout may have no glyph.
        letters = {letter for letter in text if not letter.isspace() and unicodedata.category(letter) != "Cf"}
        return all(_image(font, letter) not in (missing, None) for letter in letters)
    except (UnicodeError, OSError):  # Pillow's bitmap font, which has Latin letters only
        return False


@lru_cache(maxsize=4096)
def _default_has(letters: str) -> bool:
    """Whether Pillow's own font has all letters, at any size; drawing them to see takes longer than drawing a name."""
    return _has(ImageFont.load_default(24), letters)


def _image(font: Font, letter: str) -> tuple[tuple[int, int], bytes] | None:
    """Size and pixels of a letter; None for one without ink, as some fonts show missing letters."""
    mask = font.getmask(letter)
    content = bytes(mask)
    return (mask.size, content) if any(content) else None


@lru_cache(maxsize=256)
def _system_font(letters: str) -> str | None:
    """The file of a font of the system that has all the letters."""
    for path in (*_fontconfig_files(letters), *_folder_files()):
        try:
            if _has(ImageFont.truetype(path, 24), letters):
                return path
        except OSError:
            continue
    return None


def _fontconfig_files(letters: str) -> list[str]:
    """Font files that fontconfig, where it is installed, recommends for the letters, plain styles first."""
    command = shutil.which("fc-match")
    if command is None:
        return []
    codes = " ".join(f"{ord(letter):x}" for letter in letters if not letter.isspace())
    arguments = [command, "--sort", "--format", "%{file}\n", f"sans:charset={codes}"]
    try:
        answer = subprocess.run(arguments, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    # The rest of the list is a fallback for single letters.
    return [line for line in answer.splitlines() if line.lower().endswith(_SUFFIXES)][:20]


@lru_cache(maxsize=1)
def _folder_files() -> list[str]:
    """Font files in the usual folders, likely ones first."""
    folders = (*_FOLDERS, f"{os.environ.get('WINDIR', 'C:/Windows')}/Fonts")
    files = list(dict.fromkeys(path for folder in folders for path in _font_files(Path(folder).expanduser())))

    def rank(path: str) -> tuple[int, bool, str]:
        name = Path(path).name.lower().replace("-", "").replace("_", "")
        known = [index for index, part in enumerate(_LIKELY) if part in name]
        return (known[0] if known else len(_LIKELY), "bold" in name or "italic" in name or "oblique" in name, path)

    return sorted(files, key=rank)[:_MAX_FILES]


def _font_files(folder: Path) -> Iterator[str]:
    try:
        for path in folder.rglob("*"):
            if path.suffix.lower() in _SUFFIXES:
                yield str(path)
    except OSError:  # a folder that may not be read
        return
