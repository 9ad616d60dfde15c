// The page at `/`: one picture, many questions, each asked with and without focus. Talks to this server alone.

const LONGEST = 2048; // px: a larger picture is scaled down before it is sent
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

// Why several looks may end without an answer.
const LIMITS = {
  turns: "no answer: it still looked at its last turn",
  pictures: "no answer: it was shown as many pictures as it may",
  tokens: "no answer: a turn came to its limit of tokens",
};

const state = {
  model: null, // the served name
  several: false, // whether :focus looks as often as the model wants, without being told to
  picture: null, // {canvas, url, name}
  questions: [], // {number, text, looks, focus (the look that is shown), answers, card, stop}
  picked: null,
};

// --- Server -----------------------------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(reply) {
  const body = await reply.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered ${reply.status}`);
}

async function connect() {
  const status = $("status");
  try {
    const health = await fetch("/health");
    if (!health.ok) {
      const { status: what } = await health.json();
      Object.assign(status.dataset, { state: "loading" });
      status.textContent = what === "loading" ? "loading the model …" : what;
      return setTimeout(connect, 1500);
    }
    const reply = await fetch("/v1/models", { headers: headers() });
    if (reply.status === 401) {
      status.dataset.state = "gone";
      status.textContent = "needs an API key (under Settings)";
      document.querySelector("details").open = true;
      return;
    }
    if (!reply.ok) throw await failure(reply);
    const { data } = await reply.json();
    if (!state.model) takeDefaults(data.find(({ id }) => id === `${data[0].id}:focus`) ?? {});
    state.model = data[0].id;
    status.dataset.state = "ok";
    status.textContent = state.protocol ? `${state.model} (${state.protocol})` : state.model;
  } catch (error) {
    status.dataset.state = "gone";
    status.textContent = "no connection";
    setTimeout(connect, 3000);
  }
}

// What the server says of its :focus: the protocol of the checkpoint, its looks, and the length of its turns.
function takeDefaults({ protocol, max_looks: most, turn_tokens: tokens }) {
  Object.assign(state, { protocol, several: most !== undefined });
  if (state.several) Object.assign($("looks"), { value: most, min: 0, max: protocol ? most : 12 });
  if (tokens) $("tokens").value = tokens;
}

function looks() {
  const { value, min, max } = $("looks");
  return Math.min(Number(max), Math.max(Number(min), Math.round(Number(value)) || 0));
}

// The events of one streamed completion, as parsed chunks.
async function* completion(model, text, signal) {
  const content = [{ type: "image_url", image_url: { url: state.picture.url } }];
  content.push({ type: "text", text });
  const reply = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers(),
    signal,
    body: JSON.stringify({
      model,
      stream: true,
      messages: [{ role: "user", content }],
      temperature: Number($("temperature").value) || 0,
      max_tokens: Number($("tokens").value) || 128,
      ...(model.endsWith(":focus") && (state.several || looks() > 1) ? { max_looks: looks() } : {}),
    }),
  });
  if (!reply.ok) throw await failure(reply);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk.choices[0];
    }
  }
}

// --- Picture ----------------------------------------------------------------------------------------------------------

function notice(text) {
  $("notice").textContent = text ?? "";
  $("notice").hidden = !text;
}

async function openPicture(blob, name, ideas = []) {
  notice(null);
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    return notice(`${name} cannot be opened as a picture.`);
  }
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  for (const question of state.questions) question.stop.abort();
  Object.assign(state, { picture: { canvas, url: canvas.toDataURL("image/png"), name }, questions: [], picked: null });
  $("picture").src = state.picture.url;
  $("picture").alt = `The picture ${name}`;
  document.querySelector(".frame").classList.toggle("small-picture", Math.max(canvas.width, canvas.height) < 700);
  $("boxes").setAttribute("viewBox", `0 0 ${canvas.width} ${canvas.height}`);
  $("caption").textContent = `${name}, ${canvas.width} × ${canvas.height}${scale < 1 ? " (made smaller)" : ""}`;
  $("cards").replaceChildren();
  $("drop").hidden = true;
  $("stage").hidden = false;
  $("ideas").replaceChildren(...ideas.map(ideaButton));
  $("ideas").hidden = ideas.length === 0;
  drawBoxes();
  $("question").focus({ preventScroll: true });
}

function ideaButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.onclick = () => {
    button.remove();
    ask(text);
    $("question").focus({ preventScroll: true });
  };
  return button;
}

async function openScene() {
  try {
    const reply = await fetch("/page/scene", { headers: headers() });
    if (!reply.ok) throw await failure(reply);
    const scene = await reply.json();
    const blob = await (await fetch(scene.picture)).blob();
    await openPicture(blob, scene.name, scene.questions);
  } catch (error) {
    notice(`No scene could be drawn: ${error.message}`);
  }
}

// --- Boxes ------------------------------------------------------------------------------------------------------------

function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

function drawBoxes() {
  const svg = $("boxes");
  svg.replaceChildren();
  const { width, height } = state.picture.canvas;
  const found = state.questions.filter((question) => question.focus?.box);
  for (const question of [...found.filter((one) => one !== state.picked), ...found.filter((one) => one === state.picked)]) {
    const [x0, y0, x1, y1] = question.focus.box;
    const group = element("g", { class: question === state.picked ? "chosen" : "other" }, svg);
    if (question === state.picked) {
      const hole = `M0 0H${width}V${height}H0Z M${x0} ${y0}V${y1}H${x1}V${y0}Z`;
      element("path", { class: "veil", d: hole, "fill-rule": "evenodd" }, group);
      for (const { box } of question.looks.filter((look) => look.box && look !== question.focus)) {
        const corners = { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] };
        const other = element("g", { class: "other" }, group);
        element("rect", { class: "halo", ...corners }, other);
        element("rect", { class: "outline", ...corners }, other);
      }
    }
    const corners = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
    element("rect", { class: "halo", ...corners }, group);
    element("rect", { class: "outline", ...corners, ...(question === state.picked ? { pathLength: 1 } : {}) }, group);
  }
  $("download").disabled = found.length === 0;
}

function pick(question) {
  state.picked = question;
  for (const other of state.questions) {
    other.card.classList.toggle("picked", other === question);
    other.card.querySelector(".pick").setAttribute("aria-pressed", String(other === question));
  }
  drawBoxes();
}

// --- Questions --------------------------------------------------------------------------------------------------------

async function ask(text) {
  if (!state.picture) return notice("Choose a picture first.");
  if (!state.model) return notice("The model is not there yet.");
  notice(null);
  const card = $("card").content.cloneNode(true).firstElementChild;
  const question = { number: state.questions.length + 1, text, looks: [], focus: null, answers: {}, card, stop: new AbortController() };
  state.questions.push(question);
  card.querySelector(".number").textContent = question.number;
  card.querySelector(".asked").textContent = text;
  card.querySelector(".pick").onclick = () => {
    pick(question);
    $("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
  };
  card.querySelector(".stop").onclick = () => question.stop.abort();
  card.classList.add("busy");
  const both = $("both").checked;
  card.classList.toggle("alone", !both);
  if (!both) card.querySelector(".plain").remove();
  $("cards").prepend(card);
  pick(question);
  const sides = [run(question, "focus", `${state.model}:focus`)];
  if (both) sides.push(run(question, "plain", `${state.model}:whole`));
  await Promise.all(sides);
  card.classList.remove("busy");
}

async function run(question, side, model) {
  const place = question.card.querySelector(`.${side}`);
  const answer = place.querySelector(".answer");
  place.classList.add("waiting");
  question.answers[side] = "";
  try {
    for await (const { delta } of completion(model, question.text, question.stop.signal)) {
      if (delta.focus?.end) question.end = delta.focus.end;
      else if (delta.focus) showFocus(question, delta.focus);
      question.answers[side] += delta.content ?? "";
      answer.textContent = question.answers[side];
    }
    if (!question.answers[side]) answer.textContent = (side === "focus" && LIMITS[question.end]) || "(no words)";
    if (side === "focus" && !question.focus) place.querySelector(".where").textContent = "answered without a look";
  } catch (error) {
    answer.classList.add("fault");
    answer.textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  place.classList.remove("waiting");
}

function showFocus(question, focus) {
  question.looks.push(focus);
  const strip = question.card.querySelector(".looks");
  const number = question.looks.length;
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className: "look-number", textContent: number, ariaLabel: `Look ${number}` });
  button.onclick = () => {
    showLook(question, focus);
    pick(question);
  };
  strip.append(button);
  strip.hidden = number < 2;
  showLook(question, focus);
}

function showLook(question, focus) {
  question.focus = focus;
  const where = question.card.querySelector(".where");
  const crop = question.card.querySelector(".crop");
  const number = question.looks.indexOf(focus);
  for (const [n, button] of [...question.card.querySelectorAll(".look-number")].entries()) {
    button.setAttribute("aria-pressed", String(n === number));
  }
  crop.onload = () => crop.classList.toggle("tiny-crop", Math.max(crop.naturalWidth, crop.naturalHeight) < 140);
  if (focus.crop) crop.src = focus.crop;
  else crop.removeAttribute("src");
  crop.alt = `The crop of look ${number + 1} for question ${question.number}`;
  crop.hidden = !focus.box || !focus.crop;
  crop.title = state.protocol ? focus.box_text : "";
  where.textContent = focus.box ? focus.box.map(Math.round).join(", ") : focus.error;
  where.title = focus.box ? "left, top, right, bottom in pixels" : "";
  where.classList.toggle("fault", !focus.box);
  if (state.picked === question) drawBoxes();
}

// --- Download ---------------------------------------------------------------------------------------------------------

function annotated() {
  const { canvas } = state.picture;
  const size = Math.max(14, Math.round(Math.max(canvas.width, canvas.height) / 45));
  const shown = state.questions.filter((question) => question.focus?.box);
  const out = document.createElement("canvas");
  const pen = out.getContext("2d");
  const font = `${size}px system-ui, sans-serif`;
  pen.font = font;
  const room = canvas.width - 2 * size;
  const lines = shown.flatMap((question) => wrap(pen, `${question.number}  ${question.text}  →  ${question.answers.focus}`, room));
  out.width = canvas.width;
  out.height = canvas.height + Math.round((lines.length * 1.45 + 1) * size);
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, out.width, out.height);
  pen.drawImage(canvas, 0, 0);
  const thick = Math.max(2, Math.round(size / 6));
  pen.font = `600 ${size}px system-ui, sans-serif`;
  const marks = shown.flatMap(({ looks, number }) => looks.map((look, n) => [look.box, looks.length > 1 ? `${number}.${n + 1}` : number]));
  for (const [box, number] of marks.filter(([box]) => box)) {
    const [x0, y0, x1, y1] = box;
    for (const [colour, width] of [["#ffffff", thick * 2.5], ["#2563eb", thick]]) {
      Object.assign(pen, { strokeStyle: colour, lineWidth: width });
      pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
    const label = String(number);
    const wide = pen.measureText(label).width + size * 0.8;
    const top = y0 >= size * 1.5 ? y0 - size * 1.5 : y0;
    const left = Math.min(x0, canvas.width - wide);
    pen.fillStyle = "#2563eb";
    pen.fillRect(left, top, wide, size * 1.5);
    pen.fillStyle = "#ffffff";
    pen.fillText(label, left + size * 0.4, top + size * 1.1);
  }
  pen.font = font;
  pen.fillStyle = "#1c1f26";
  lines.forEach((line, index) => pen.fillText(line, size, canvas.height + size * (1.5 + index * 1.45)));
  return out;
}

function wrap(pen, text, room) {
  const lines = [""];
  for (const word of text.split(/(?<=\s)/)) {
    if (lines.at(-1) && pen.measureText(lines.at(-1) + word).width > room) lines.push("    ");
    lines[lines.length - 1] += word;
  }
  return lines;
}

function download() {
  annotated().toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${state.picture.name.replace(/\.[a-z]+$/i, "").replace(/[^\w-]+/g, "-") || "picture"}-annotated.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }, "image/png");
}

// --- Events -----------------------------------------------------------------------------------------------------------

const pictureIn = (list) => [...(list ?? [])].find((file) => file.type.startsWith("image/"));
$("file").onchange = ({ target }) => {
  if (target.files[0]) openPicture(target.files[0], target.files[0].name);
  target.value = "";
};
$("scene").onclick = $("scene-again").onclick = openScene;
$("download").onclick = download;
$("key").onchange = connect;
$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (!text || !state.picture) return ask(text);
  $("question").value = "";
  ask(text);
};
addEventListener("paste", ({ clipboardData }) => {
  const file = pictureIn(clipboardData?.files);
  if (file) openPicture(file, file.name || "pasted picture");
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dragging"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const file = pictureIn(event.dataTransfer.files);
  if (file) openPicture(file, file.name);
  else notice("That is no picture.");
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") for (const question of state.questions) question.stop.abort();
  const typing = event.target.matches("input, textarea");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("question").focus();
  }
});
connect();
