from tests.models import llama, plant  # noqa: F401
