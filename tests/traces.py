"""What a trace of torch's profiler says about order and streams."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import profile

Event = dict[str, Any]


class Window(NamedTuple):
    """Microseconds of the host's clock."""

    start: float
    end: float


def read_trace(profiler: profile, folder: Path) -> list[Event]:
    """The events of a finished profile."""
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text())["traceEvents"]


def windows(events: list[Event], name: str) -> list[Window]:
    """When the host was within ``record_function(name)``, in order."""
    found = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == name]
    return sorted(Window(event["ts"], event["ts"] + event["dur"]) for event in found)


def streams(events: list[Event], during: list[Window]) -> set[int]:
    """The streams of the kernels and copies that the host launched in these windows."""
    launched = {
        event["args"]["correlation"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and any(window.start <= event["ts"] <= window.end for window in during)
    }
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return {event["args"]["stream"] for event in on_device if event["args"]["correlation"] in launched}
