"""The tags on the wire between policy and search engine.

To most tokenizers they are ordinary text of several tokens each; some (Qwen3) know `<think>` and
`</think>` as single added tokens. Nothing here may depend on which.
"""

from __future__ import annotations

BEGIN_QUERY = "<|begin_of_query|>"
END_QUERY = "<|end_of_query|>"
BEGIN_DOCUMENTS = "<|begin_of_documents|>"
END_DOCUMENTS = "<|end_of_documents|>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"

QUERY_TAGS = (BEGIN_QUERY, END_QUERY)
DOCUMENT_TAGS = (BEGIN_DOCUMENTS, END_DOCUMENTS)
PROTOCOL_TAGS = (
    *QUERY_TAGS,
    *DOCUMENT_TAGS,
    THINK_OPEN,
    THINK_CLOSE,
    ANSWER_OPEN,
    ANSWER_CLOSE,
)

# The seven strings whose counts a well-formed response holds equal, in the recipe's order.
COUNTED_TAGS = (
    f"{BEGIN_DOCUMENTS}\n",
    f"{END_DOCUMENTS}\n\n",
    BEGIN_QUERY,
    END_QUERY,
    BEGIN_DOCUMENTS,
    END_DOCUMENTS,
    f"{BEGIN_DOCUMENTS}\n(1)",
)
