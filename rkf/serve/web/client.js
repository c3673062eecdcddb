// Speaks the server's OpenAI protocol: lists the models and streams one answer. Knows nothing of the page.

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

async function checked(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not JSON of the server's own: a proxy's page, for instance. The status says it all.
  }
  throw new ServerError(message, response.status);
}

/** Names of the models that the server offers. */
export async function listModels(key) {
  const response = await checked(await fetch("v1/models", { headers: headers(key) }));
  return (await response.json()).data.map((model) => model.id);
}

/** Yields the JSON of each server-sent event until the server says [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/**
 * Streams one answer.
 * Yields { content, reasoning, finish, usage }; each is absent from events that do not carry it.
 */
export async function* streamAnswer(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await checked(
    await fetch("v1/chat/completions", { method: "POST", headers: headers(key), body, signal }),
  );
  for await (const event of events(response)) {
    if (event.error) throw new ServerError(event.error.message, response.status);
    const choice = event.choices?.[0];
    yield {
      content: choice?.delta?.content ?? undefined,
      reasoning: choice?.delta?.reasoning_content ?? undefined,
      finish: choice?.finish_reason ?? undefined,
      usage: event.usage ?? undefined,
    };
  }
}
