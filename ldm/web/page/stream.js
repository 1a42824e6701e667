// Asking the server. One request is one job; aborting it cancels the job.

async function refused(answer) {
  const said = await answer.json().catch(() => ({}));
  return new Error(said.error || `the server answers ${answer.status}`);
}

export async function schema() {
  const answer = await fetch("api/schema");
  if (!answer.ok) throw await refused(answer);
  return answer.json();
}

// The settings inside a PNG: {settings, notices}.
export async function recipe(png) {
  const answer = await fetch("api/recipe", { method: "POST", body: png });
  if (!answer.ok) throw await refused(answer);
  return answer.json();
}

// The events of a job, as {event, ...}. `files`: blobs by name.
export async function* draw(job, files, signal) {
  const body = new FormData();
  body.append("job", JSON.stringify(job));
  for (const [name, file] of Object.entries(files)) body.append(name, file, `${name}.png`);
  const answer = await fetch("api/draw", { method: "POST", body, headers: { Accept: "text/event-stream" }, signal });
  if (!answer.ok) throw await refused(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const [name, data] = block.split("\n");
      yield { event: name.slice("event: ".length), ...JSON.parse(data.slice("data: ".length)) };
    }
  }
}

export function blob(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type });
}
