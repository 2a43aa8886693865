"""The fields of the rows that stages read and write."""

GIVEN_FIELDS = {"question": str, "answer": str, "response": str}
"""of a user's own rollout; what else our own have is worked out"""
ROLLOUT_FIELDS = {"problem_id": str, **GIVEN_FIELDS, "correct": bool}
PROBLEM_FIELDS = {"id": str, "question": str, "answer": str}
