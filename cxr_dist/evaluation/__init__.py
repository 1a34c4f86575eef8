"""From a finished run and images to metrics, intervals, calibration, figures and the report.

Trains nothing. Writes into a run only a calibration, on request.
"""
