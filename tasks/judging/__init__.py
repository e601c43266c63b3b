"""Pairs of answers, judged; and the verdicts as rates with their uncertainty."""
