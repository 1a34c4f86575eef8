"""Distributed, high-throughput training and evaluation of chest X-ray classifiers.

Importing this package changes two environment variables, for this process and those that it starts, where they are not
set and it is not too late:

- ``TF_ENABLE_ONEDNN_OPTS=1``, unless TensorFlow has been imported. TensorFlow uses oneDNN by itself only on CPUs with
  AVX512_VNNI or newer. On an AVX2 CPU (Zen 3) training ResNet50 is 1.4 times as fast with it at 224 pixels and 3 times
  at 64. It also changes results in their last digits, so import this package before TensorFlow, or set the variable, to
  have the same numbers as the command line and Ray's workers.
- ``KERAS_BACKEND=tensorflow``, unless Keras has been imported. There is no other backend here; one that was chosen
  before is refused when it is first needed (`devices.check_backend`).

Whatever computes on a CPU also has glibc keep freed memory for the whole process (`devices.keep_freed_memory`).
"""

import os
import sys

if "tensorflow" not in sys.modules:
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
if "keras" not in sys.modules and not os.environ.get("KERAS_BACKEND"):
    os.environ["KERAS_BACKEND"] = "tensorflow"
