"""A job small enough for a test, that other processes can run: python -m tests.serve.job_case PROMPTS OUT PORT P N."""

import dataclasses
import sys

import jax

from kvjax.models.weights import Model
from kvjax.serve import jobs
from tests.tiny import CONFIG, random_params


def model():
    return Model(random_params(dataclasses.replace(CONFIG, layers=1)), None, None, (), None, None)


def run(prompts, out, **settings):
    return jobs.run(model(), prompts, out, **{"max_new_tokens": 4, "batch_tokens": 64, **settings})


if __name__ == "__main__":
    prompts, out, port, process, count = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
    print(run(prompts, out))
