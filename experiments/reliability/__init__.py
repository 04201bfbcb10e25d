"""Trials of library and trainer: random trees and models, long runs, kills, damaged files."""
