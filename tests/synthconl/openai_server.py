"""A local server of OpenAI's chat protocol, whose answers come from a function."""

from modular_star_encoder.synthconl.translation import TOO_LONG
from tests.utils.http_server import LocalServer


class OpenAIServer(LocalServer):
    """Completes each prompt by `answer`; `fault(number, body, headers)` of a request may give another reply."""

    def __init__(self, answer, fault=None):
        super().__init__(answer)
        self.fault = fault
        self.prompts = []  # of the requests that were answered with a completion
        self.base_url = f"{self.url}/v1"

    @property
    def bodies(self):
        return [request.body for request in self.requests]

    def respond(self, request):
        if self.fault and (reply := self.fault(request.number, request.body, request.headers)) is not None:
            return reply
        assert request.path == "/v1/chat/completions"
        prompt = request.body["messages"][0]["content"]
        completion = self.answer(prompt)
        if completion.error:
            code = "context_length_exceeded" if completion.finish_reason == TOO_LONG else None
            return 400, {"error": {"message": completion.error, "code": code}}, {}
        self.prompts.append(prompt)
        message = {"role": "assistant", "content": completion.text}
        choice = {"index": 0, "message": message, "finish_reason": completion.finish_reason}
        usage = {"prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens}
        return 200, {"model": request.body["model"], "choices": [choice], "usage": usage}, {}
