"""The command line: arguments, and what each command calls.

Holds no application logic and imports no TensorFlow.
"""
