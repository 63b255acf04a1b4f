// The page of `moelet serve`: asks the server for texts and shows where each token went. All that comes from a model is
// put in as text, never as HTML.
"use strict";
(() => {
  const COLORS = 8;
  const LINES = 11;
  const END = 2; // the tokenizer's mark of a document's end
  const MARKS = { "\n": "↵", "\r": "␍", "\t": "⇥", " ": "·" };
  const UNSEEN = /^[\p{Cc}\p{Cf}\p{Mn}]*$/u; // half a character, or one that has no shape of its own
  const $ = (id) => document.getElementById(id);
  const card = $("card");
  const panes = [];
  let layer = 0;
  let running = null;

  function make(kind, parent, text = "", ...classes) {
    const node = document.createElement(kind);
    node.textContent = text;
    node.classList.add(...classes);
    parent.append(node);
    return node;
  }

  const look = (expert) => [`c${expert % COLORS}`, `m${Math.floor(expert / COLORS) % LINES}`];
  const visible = (piece) => [...piece].map((c) => MARKS[c] ?? c).join("");
  const percent = (p) => (p === null ? "" : p >= 0.0995 ? `${Math.round(100 * p)} %` : `${(100 * p).toFixed(1)} %`);

  // The secret of a server that others reach: from the address's #token=..., which no server ever sees, or typed in.
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname);
  }

  function headers() {
    const token = sessionStorage.getItem("token");
    return { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
  }

  async function checked(answer) {
    if (answer.ok) return answer;
    if (answer.status === 401) $("key-label").hidden = false;
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `The server says ${answer.status}.`);
  }

  class Pane {
    constructor(name, shape) {
      this.name = name;
      this.shape = shape;
      this.dense = shape.n_experts === 1;
      this.root = make("section", $("panes"), "", "pane");
      const head = make("h2", this.root, name);
      this.status = make("small", head);
      this.text = make("pre", this.root, "", "shaded");
      this.text.tabIndex = 0;
      this.text.setAttribute("aria-label", `text by ${name}; arrow keys step through its tokens`);
      this.load = make("div", this.root, "", "load");
      this.bars = this.dense ? [] : Array.from({ length: shape.n_experts }, (_, expert) => this.addBar(expert));
      if (this.dense) make("small", this.load, "A dense model: every token uses all of it.");
      this.alone = null;
      this.listen();
      this.clear();
    }

    addBar(expert) {
      const button = make("button", this.load, "", ...look(expert));
      button.type = "button";
      make("b", button, `expert ${expert}`).classList.add(look(expert)[1]);
      const bar = make("i", button);
      const number = make("em", button);
      button.addEventListener("click", () => {
        this.alone = this.alone === expert ? null : expert;
        this.paint();
      });
      return { button, bar, number };
    }

    clear() {
      this.tokens = [];
      this.current = null;
      this.counts = Array.from({ length: this.shape.n_layers }, () => new Array(this.shape.n_experts).fill(0));
      this.text.replaceChildren();
      this.began = null;
      this.fresh = 0;
      this.measure();
      this.status.textContent = "";
    }

    get layer() { return Math.min(layer, this.shape.n_layers - 1); }

    listen() {
      const under = (event) => this.tokens[Number(event.target.dataset?.token ?? -1)] ?? null;
      this.text.addEventListener("pointerover", (event) => this.show(under(event)));
      this.text.addEventListener("pointerleave", () => this.show(null));
      this.text.addEventListener("blur", () => this.show(null));
      this.text.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") this.show(null);
        if (!step || !this.tokens.length) return;
        event.preventDefault();
        const last = this.tokens.length - 1;
        const at = this.current ? this.tokens.indexOf(this.current) + step : step > 0 ? 0 : last;
        this.show(this.tokens[Math.max(0, Math.min(last, at))]);
        this.current.nodes[0].scrollIntoView({ block: "nearest" });
      });
    }

    add(told, isGiven) {
      const below = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
      for (const token of told) {
        const entry = { ...token, isGiven, nodes: this.place(token.text, this.tokens.length) };
        this.tokens.push(entry);
        token.experts.forEach((chosen, k) => chosen.forEach(([expert]) => { this.counts[k][expert] += 1; }));
        this.color(entry);
      }
      if (!isGiven) {
        this.began ??= performance.now();
        this.fresh += told.length;
        const seconds = (performance.now() - this.began) / 1000;
        const rate = seconds > 0.3 ? `, ${Math.round(this.fresh / seconds)} a second` : "";
        this.status.textContent = `${this.fresh} tokens${rate}`;
      }
      if (below) this.text.scrollTop = this.text.scrollHeight;
      this.pending ??= requestAnimationFrame(() => { this.pending = null; this.measure(); });
    }

    // Returns a token's spans: one a line of its text, so that the ends of lines stand outside of them.
    place(text, index) {
      const lines = text.split("\n");
      const nodes = [];
      lines.forEach((line, k) => {
        const ends = k < lines.length - 1;
        if (line || ends || lines.length === 1) {
          const node = make("span", this.text, line);
          node.dataset.token = index;
          node.dataset.kind = ends ? "line" : UNSEEN.test(text) ? "part" : "";
          nodes.push(node);
        }
        if (ends) this.text.append("\n");
      });
      return nodes;
    }

    end(how) {
      const words = { stop: "end of the text", time: "out of time", stopped: "stopped" }[how];
      if (words) make("span", this.text, `■ ${words}`, "end");
    }

    color(token) {
      const chosen = (token.experts[this.layer] ?? []).map(([expert]) => expert);
      const place = this.alone === null ? 0 : chosen.indexOf(this.alone);
      const kinds = chosen.length ? look(chosen[Math.max(place, 0)]) : ["dense"];
      if (place > 0) kinds.push("later");
      if (place < 0 && chosen.length) kinds.push("dim");
      if (token.isGiven) kinds.push("given");
      if (token === this.current) kinds.push("current");
      for (const node of token.nodes) {
        node.className = kinds.join(" ");
        node.dataset.expert = chosen[0] ?? "";
      }
    }

    measure() {
      const counts = this.counts[this.layer];
      const total = counts.reduce((sum, count) => sum + count, 0);
      this.bars.forEach(({ bar, number }, expert) => {
        const load = total ? (counts[expert] * counts.length) / total : 0;
        bar.style.setProperty("--share", `${Math.min(100, 50 * load)}%`);
        number.textContent = total ? load.toFixed(2) : "";
      });
    }

    paint() {
      this.bars.forEach(({ button }, expert) => button.setAttribute("aria-pressed", expert === this.alone));
      this.tokens.forEach((token) => this.color(token));
      this.measure();
      if (this.current) this.show(this.current);
    }

    show(token) {
      const before = this.current;
      this.current = token;
      [before, token].filter(Boolean).forEach((each) => this.color(each));
      card.hidden = token === null;
      if (token) fill(token, this);
    }
  }

  function fill(token, pane) {
    card.replaceChildren();
    const head = make("h3", card);
    make("code", head, visible(token.piece));
    make("span", head, token.p === null ? "nothing before it" : percent(token.p));
    const rows = token.likely.some(([id]) => id === token.id) || token.p === null
      ? token.likely
      : [...token.likely, [token.id, token.piece, token.p]];
    const top = Math.max(...rows.map(([, , p]) => p), 1e-9);
    for (const [id, piece, p] of rows) {
      const row = make("div", card, "", "row", ...(id === token.id ? ["chosen"] : []));
      make("code", row, id === END ? "end of the text" : visible(piece));
      make("i", row).style.setProperty("--share", `${(100 * p) / top}%`);
      make("em", row, percent(p));
    }
    if (token.experts.length) {
      const went = make("div", card, "", "went");
      token.experts.forEach((chosen, k) => {
        const group = make("span", went, "", ...(k === pane.layer ? ["here"] : []));
        make("small", group, `layer ${k}`);
        for (const [expert] of chosen) make("b", group, `${expert}`, ...look(expert));
      });
    }
    const box = token.nodes[0].getBoundingClientRect();
    const size = card.getBoundingClientRect();
    const below = box.bottom + 8 + size.height < innerHeight;
    card.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
    card.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - 8 - size.height)}px`;
  }

  async function* events(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("The server ended the answer early.");
      const lines = (buffer + value).split("\n");
      buffer = lines.pop();
      for (const line of lines.filter((each) => each.startsWith("data: "))) {
        if (line === "data: [DONE]") return;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        yield event.choices[0];
      }
    }
  }

  async function write(pane, fields, signal) {
    pane.clear();
    try {
      const body = JSON.stringify({ ...fields, model: pane.name, stream: true, routing: true });
      const answer = await checked(await fetch("v1/completions", { method: "POST", headers: headers(), body, signal }));
      for await (const choice of events(answer)) {
        pane.add(choice.moelet.prompt, true);
        pane.add(choice.moelet.tokens, false);
        if (choice.moelet.ended) pane.end(choice.moelet.ended);
      }
    } catch (error) {
      if (!signal.aborted) throw error;
      pane.end("stopped");
    }
  }

  async function go() {
    if (running) return;
    const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
    const fields = {
      prompt: $("prompt").value.replaceAll("\r\n", "\n"),
      max_tokens: number("tokens"),
      temperature: number("temperature"),
      top_k: number("top-k"),
      seed: number("seed") ?? Math.floor(Math.random() * 2 ** 32), // the same for both
    };
    if ($("key").value) sessionStorage.setItem("token", $("key").value);
    running = new AbortController();
    $("told").textContent = "";
    $("go").hidden = true;
    $("stop").hidden = false;
    card.hidden = true;
    try {
      if (!panes.length) await start();
      const shown = panes.filter((pane) => !pane.root.hidden);
      const written = await Promise.allSettled(shown.map((pane) => write(pane, fields, running.signal)));
      const failed = written.find((each) => each.status === "rejected");
      if (failed) throw failed.reason;
    } catch (error) {
      $("told").textContent = error.message;
    } finally {
      running = null;
      $("go").hidden = false;
      $("stop").hidden = true;
    }
  }

  function choose(buttons, chosen, mark) {
    buttons.forEach((button) => button.setAttribute(mark, button === chosen));
  }

  function addLayers(count) {
    const nav = $("layers");
    make("span", nav, "layer");
    const buttons = Array.from({ length: count }, (_, k) => {
      const button = make("button", nav, `${k}`);
      button.type = "button";
      button.addEventListener("click", () => {
        layer = k;
        choose(buttons, button, "aria-pressed");
        panes.forEach((pane) => pane.paint());
      });
      return button;
    });
    choose(buttons, buttons[0], "aria-pressed");
    nav.hidden = false;
  }

  function addRuns() {
    const options = [["side by side", panes], ...panes.map((pane) => [pane.name, [pane]])];
    const buttons = options.map(([name, shown]) => {
      const button = make("button", $("runs"), name);
      button.type = "button";
      button.setAttribute("role", "radio");
      button.addEventListener("click", () => {
        panes.forEach((pane) => { pane.root.hidden = !shown.includes(pane); });
        choose(buttons, button, "aria-checked");
      });
      return button;
    });
    choose(buttons, buttons[0], "aria-checked");
    $("runs").hidden = false;
  }

  function told(shape) {
    const size = shape.parameters >= 1e6 ? `${(shape.parameters / 1e6).toFixed(1)}M` : `${Math.round(shape.parameters / 1e3)}k`;
    const layers = shape.n_experts === 1
      ? `${shape.n_layers} dense layers`
      : `${shape.n_layers} layers of ${shape.n_experts} experts, ${shape.top_k} for each token`;
    return `${layers}; ${size} parameters, step ${shape.step.toLocaleString("en")}`;
  }

  async function start() {
    const answer = await checked(await fetch("v1/models", { headers: headers() }));
    const models = (await answer.json()).data;
    panes.push(...models.map((model) => new Pane(model.id, model.moelet)));
    $("names").textContent = models.map((model) => model.id).join(" and ");
    document.title = `${models.map((model) => model.id).join(", ")}: moelet serve`;
    const shapes = models.map((model) => told(model.moelet));
    $("shapes").textContent = new Set(shapes).size === 1 && models.length > 1
      ? `each ${shapes[0]}`
      : models.map((model, k) => (models.length > 1 ? `${model.id}: ${shapes[k]}` : shapes[k])).join(" · ");
    if (!panes.every((pane) => pane.dense)) addLayers(Math.max(...models.map((model) => model.moelet.n_layers)));
    if (panes.length > 1) addRuns();
    $("key-label").hidden = true;
  }

  $("ask").addEventListener("submit", (event) => { event.preventDefault(); go(); });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); go(); }
  });
  $("stop").addEventListener("click", () => running?.abort());
  start().catch((error) => { $("told").textContent = error.message; });
})();
