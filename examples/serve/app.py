"""A model folder, exported or not, behind an ASGI server.

    pip install 'hf-segvit[onnx]' fastapi uvicorn
    HF_SEGVIT_MODEL=exported uvicorn app:app --host 127.0.0.1 --port 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000/segment

POST /segment takes an image file as the body, or a form (multipart/form-data) with the image in a field of any name,
and answers with its segments and, unless `?map=0`, a PNG of 16 bits in which the pixel value is a segment's id + 1.

Settings are environment variables: HF_SEGVIT_MODEL, HF_SEGVIT_THREADS (of the processor for one image),
HF_SEGVIT_PARALLEL (images at a time, default 1), HF_SEGVIT_QUEUE (images that may wait, default 32; more are told to
come back, 503), HF_SEGVIT_MAX_BYTES (of an upload, default 20 million) and HF_SEGVIT_MAX_PIXELS (of an image, default
50 million).
"""

import asyncio
import base64
import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import Message
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from starlette.requests import ClientDisconnect

from hf_segvit import Segmenter
from hf_segvit.models.image_decoding import open_image

MAX_BYTES = int(os.environ.get("HF_SEGVIT_MAX_BYTES", 20_000_000))
PARALLEL = int(os.environ.get("HF_SEGVIT_PARALLEL", 1))
QUEUE = int(os.environ.get("HF_SEGVIT_QUEUE", 32))
UPLOAD_SECONDS = 30  # after which a client that is still sending is turned away
os.environ.setdefault("HF_SEGVIT_MAX_PIXELS", "50000000")  # which `open_image` reads


@asynccontextmanager
async def load(app: FastAPI) -> AsyncIterator[None]:
    """Load the model when the server starts, so that a wrong folder stops it at once."""
    folder = os.environ.get("HF_SEGVIT_MODEL")
    if not folder:
        raise ValueError("set HF_SEGVIT_MODEL to a model folder or a Hub id")
    threads = os.environ.get("HF_SEGVIT_THREADS")
    app.state.segmenter = Segmenter.from_pretrained(folder, threads=int(threads) if threads else None)
    app.state.turn = asyncio.Semaphore(PARALLEL)
    app.state.waiting = 0
    yield


app = FastAPI(title="Image segmentation", lifespan=load)


@app.get("/health")
async def health() -> dict[str, Any]:
    """What is served, and how many images are being segmented or wait for it."""
    segmenter = app.state.segmenter
    return {"task": segmenter.task, "runs_on": segmenter.device_description, "waiting": app.state.waiting}


@app.post("/segment")
async def segment(request: Request, map: bool = True) -> dict[str, Any]:
    """Segment the image of the request."""
    # Counted before the upload is read, since uploads that wait take memory, too.
    if app.state.waiting >= PARALLEL + QUEUE:
        raise HTTPException(503, "too many images are waiting; try again in a moment", {"Retry-After": "1"})
    app.state.waiting += 1
    try:
        content = image_of(await read_body(request), request.headers.get("content-type", ""))
        async with app.state.turn:
            return await run_in_threadpool(answer, app.state.segmenter, content, map)
    finally:
        app.state.waiting -= 1


async def read_body(request: Request) -> bytes:
    """The body, of which no more is read than may come."""
    stated = request.headers.get("content-length", "")
    too_large = HTTPException(413, f"the upload has more than {MAX_BYTES} bytes; send a smaller image")
    if stated.isdecimal() and int(stated) > MAX_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise too_large
    except TimeoutError as error:
        raise HTTPException(408, f"the upload took more than {UPLOAD_SECONDS} seconds") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the upload ended before its end") from error
    return bytes(body)


def image_of(body: bytes, content_type: str) -> bytes:
    """The file in the body: the body itself, or the first part of a form that has a file name."""
    header = Message()
    header["content-type"] = content_type
    if header.get_content_type() != "multipart/form-data":
        return body
    boundary = header.get_boundary()
    if not boundary:
        raise HTTPException(400, "the form's Content-Type names no boundary; leave that header to your HTTP library")
    delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
    first, *parts = (b"\r\n" + body).split(delimiter)
    if not parts or first.strip() or not parts[-1].startswith(b"--"):
        raise HTTPException(400, "the form is damaged: it does not begin and end with its boundary; send it again")
    for part in parts[:-1]:
        head, separator, content = part.partition(b"\r\n\r\n")
        if separator and b"filename" in head.lower():
            return content
    raise HTTPException(400, "the form has no file; send the image as a file in any of its fields")


def answer(segmenter: Segmenter, content: bytes, with_map: bool) -> dict[str, Any]:
    """Segments of an image file, with the map on request."""
    try:
        image = open_image(content, "the upload", segmenter.image_settings)
        (result,) = segmenter([image])
    except ValueError as error:  # about the image: the model has answered before
        raise HTTPException(422, str(error)) from error
    height, width = result.segment_map.shape
    rows = [
        {name: getattr(each, name) for name in ("id", "label_id", "label", "score", "area", "bbox", "rle")}
        for each in result.segments
    ]
    found: dict[str, Any] = {"task": result.task, "height": height, "width": width, "segments": rows}
    if with_map:
        file = io.BytesIO()
        Image.fromarray((result.segment_map + 1).astype(np.uint16)).save(file, "PNG", compress_level=1)
        found["map_png"] = base64.b64encode(file.getvalue()).decode()
    return found
