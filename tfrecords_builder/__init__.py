"""Labelled image files in, a verified, sharded TFRecord dataset with a manifest out.

The package imports neither TensorFlow at module level nor the trainer: it builds and verifies datasets
on machines that have neither an accelerator nor seconds to spare for an import.
"""
