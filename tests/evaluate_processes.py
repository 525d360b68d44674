"""A process that evaluates its share of the images through `evaluate`; `tests/test_evaluate_modules.py` starts several.

Arguments: module folder, cache folder, process number, number of processes, file of the images, file for the results.
"""

import pickle
import sys
from pathlib import Path

import evaluate

if __name__ == "__main__":
    module, cache, process_id, num_process, images, output = sys.argv[1:]
    rounds, settings = pickle.loads(Path(images).read_bytes())
    metric = evaluate.load(
        module,
        process_id=int(process_id),
        num_process=int(num_process),
        experiment_id="two.processes",
        cache_dir=cache,
        timeout=60,
        **settings,
    )
    results = []
    for samples in rounds:
        for index, (prediction, reference) in list(enumerate(samples))[int(process_id) :: int(num_process)]:
            metric.add(prediction=prediction, reference=reference, image_id=index)
        try:
            results.append(metric.compute())
        except ValueError as error:
            results.append(str(error))
    Path(output).write_bytes(pickle.dumps(results))
