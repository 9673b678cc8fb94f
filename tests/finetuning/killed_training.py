"""A training that is killed in each of its epochs in turn, each time in a process of its own.

Its arguments are a moment of a process's second epoch ("step", "write", "activations", or "never"),
the folder of the checkpoint, the file for the state of the network, and the parameters as JSON. It
prints the number of processes.
"""

import json
import os
import signal
import sys
import warnings

import numpy as np
import torch

from deepfeat import FineTuneClassifier
from deepfeat._finetuning import saving, sources
from deepfeat._finetuning.training import Trainer


def make_data():
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)), np.arange(12) % 3


def make_classifier(**params):
    options = {"image_size": 32, "batch_size": 4, "random_state": 0, "device": "cpu"}
    return FineTuneClassifier("resnet10_slim", num_workers=0, **options | params)


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment):
    """Let this process die in its second epoch, or before that in keeping activations."""
    epoch = step = 0
    run_epoch, take_step, save_file = Trainer.run_epoch, Trainer._step, saving.save_file

    def count_epochs(*args):
        nonlocal epoch, step
        epoch, step = epoch + 1, 0
        return run_epoch(*args)

    def count_steps(*args):
        nonlocal step
        step += 1
        if epoch == 2 and step == 2:
            die()
        return take_step(*args)

    def write_half(tensors, path, metadata):
        if epoch == 2:
            path.write_bytes(b"half of a file")
            die()
        save_file(tensors, path, metadata)

    Trainer.run_epoch = count_epochs
    if moment == "write":
        saving.save_file = write_half
    else:
        Trainer._step = count_steps
    if moment == "activations":
        sources._keep = die


def main():
    moment, folder, result, params = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    processes, status = 0, -1
    while status:
        processes += 1
        child = os.fork()
        if child == 0:
            # Activations are kept before a process trains, so in every other one.
            if moment != "never":
                die_at("step" if moment == "activations" and processes % 2 else moment)
            classifier = make_classifier(checkpoint=folder, **json.loads(params))
            torch.save(classifier.fit(*make_data()).module_.state_dict(), result)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status and not os.WIFSIGNALED(status):
            sys.exit("It failed instead of being killed.")
    print(processes)


if __name__ == "__main__":
    main()
