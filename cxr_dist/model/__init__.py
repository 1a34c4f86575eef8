"""The network: ResNet50 with its head, the split between frozen and trained layers, the forward pass.

Knows nothing of optimizers, runs or datasets.
"""
