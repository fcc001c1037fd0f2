"""lmms-eval's own evaluator in a process of its own, offline: its arguments are one JSON object.

{model, packs, tasks, batch_size, many} -> prints {results, samples} of the tasks on the last line.
lmms-eval changes libraries for the whole process on import, so it does not run among the tests.
"""

from __future__ import annotations

import json
import socket
import sys


def no_network(*what: object, **more: object) -> None:
    raise OSError("there is no network in the tests")


socket.create_connection = no_network  # type: ignore[assignment]
socket.getaddrinfo = no_network  # type: ignore[assignment]

from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.models import MODEL_REGISTRY_V2  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

from llava_hd.bench.lmms_manifest import manifest  # noqa: E402


def main() -> None:
    asked = json.loads(sys.argv[1])
    # What the package's entry point does where the package is installed.
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    found = simple_evaluate(
        model="llava_hd",
        model_args=f"pretrained={asked['model']},prompts=paper",
        tasks=asked["tasks"],
        batch_size=asked["batch_size"],
        device="cpu",
        task_manager=TaskManager(include_path=asked["packs"], model_name="llava_hd"),
    )
    results = {
        task: {name.partition(",")[0]: value for name, value in scores.items()}
        for task, scores in found["results"].items()
    }
    samples = {
        task: [(row["doc_id"], row["filtered_resps"]) for row in rows]
        for task, rows in found["samples"].items()
    }
    print("\n" + json.dumps({"results": results, "samples": samples}, default=str))


if __name__ == "__main__":
    main()
