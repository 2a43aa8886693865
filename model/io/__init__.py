"""Readers and writers of files and tokens: Hugging Face folders, tokenizer, chat template, atomic JSON and JSON Lines.

May import: model.
"""
