// A masked-diffusion language model and its autoregressive twin, at work in the page: no library, no server, no build.
// Chapter 10a_browser.ipynb explains this file; lucy.html has the controls, lucy.css how they look.
(() => {
  const HERE = document.currentScript.src; // all files are looked for beside this script

  // ---------- a run folder, as nanollada.backbone.save_run leaves it
  async function read(path, as) {
    const answer = await fetch(new URL(path, HERE));
    if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
    return answer[as]();
  }

  // safetensors: 8 bytes say how long the header is; the header, JSON, names type, shape and place; then the numbers.
  function readTensors(file) {
    const start = 8 + Number(new DataView(file).getBigUint64(0, true));
    const { __metadata__, ...header } = JSON.parse(new TextDecoder().decode(file.slice(8, start))), tensors = {};
    for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
      const bytes = file.slice(start + from, start + to), widen = (half) => half << 16; // BF16: upper half of F32
      const bits = dtype === "BF16" ? Uint32Array.from(new Uint16Array(bytes), widen).buffer : bytes;
      tensors[name] = { shape, data: new Float32Array(bits) };
    }
    return tensors;
  }

  const readModel = async (folder) => ({ cfg: await read(`${folder}/config.json`, "json"),
    tensors: readTensors(await read(`${folder}/model.safetensors`, "arrayBuffer")) });

  // ---------- the transformer (chapter 04)
  // y = x W', for each row of x; W is stored as PyTorch stores it, a row for each output.
  function linear(x, { shape: [outputs, inputs], data: w }) {
    const rows = x.length / inputs, y = new Float32Array(rows * outputs);
    for (let n = 0; n < y.length; n++) {
      let a = Math.floor(n / outputs) * inputs, b = (n % outputs) * inputs, total = 0;
      const end = a + inputs;
      for (; a + 3 < end; a += 4, b += 4) { // four products at a time, which is faster than one
        total += x[a] * w[b] + x[a + 1] * w[b + 1] + x[a + 2] * w[b + 2] + x[a + 3] * w[b + 3];
      }
      for (; a < end; a++, b++) total += x[a] * w[b];
      y[n] = total;
    }
    return y;
  }

  // Each row divided by the root of its mean square, times a learned weight (RMSNorm).
  function norm(x, { data: weight }, epsilon) {
    const width = weight.length, y = new Float32Array(x.length);
    for (let row = 0; row < x.length; row += width) {
      const squares = x.subarray(row, row + width).reduce((total, a) => total + a * a, 0);
      for (let c = 0; c < width; c++) y[row + c] = (x[row + c] * weight[c]) / Math.sqrt(squares / width + epsilon);
    }
    return y;
  }

  // Turn coordinates i and i + half of every head by an angle that grows with the position (RoPE), in place.
  function rotate(x, { head_dim, rope_theta }, width, past) {
    const half = head_dim / 2;
    for (let head = 0; head < x.length; head += head_dim) {
      for (let i = 0; i < half; i++) {
        const angle = (past + Math.floor(head / width)) * rope_theta ** (-i / half), a = head + i, b = a + half;
        const cos = Math.cos(angle), sin = Math.sin(angle);
        [x[a], x[b]] = [x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin];
      }
    }
    return x;
  }

  const sum = (x) => x.reduce((a, b) => a + b, 0);
  function softmax(x) {
    const top = Math.max(...x), e = x.map((a) => Math.exp(a - top)), total = sum(e);
    return e.map((a) => a / total);
  }

  // What each position gathers from what it sees: all or, in the twin, all before. Memory: keys and values so far.
  function attention(cfg, x, weight, memory) {
    const d = cfg.head_dim, wide = cfg.num_attention_heads * d, narrow = cfg.num_key_value_heads * d;
    const project = (name) => linear(x, weight(`self_attn.${name}_proj`)), past = memory.k.length / narrow;
    const even = (y, name) => (cfg.qk_norm ? norm(y, weight(`self_attn.${name}_norm`), cfg.rms_norm_eps) : y);
    const q = rotate(even(project("q"), "q"), cfg, wide, past).map((a) => a / Math.sqrt(d));
    const k = (memory.k = Float32Array.of(...memory.k, ...rotate(even(project("k"), "k"), cfg, narrow, past)));
    const v = (memory.v = Float32Array.of(...memory.v, ...project("v"))), mixed = new Float32Array(q.length);
    for (let mine = 0; mine < q.length; mine += d) { // a head of a position, and the key/value head that it shares
      const row = Math.floor(mine / wide), theirs = Math.floor(((mine % wide) * narrow) / wide / d) * d;
      const scores = new Float64Array(past + (cfg.objective === "ar" ? row + 1 : q.length / wide));
      scores.forEach((_, j) => {
        for (let c = 0; c < d; c++) scores[j] += q[mine + c] * k[j * narrow + theirs + c];
      });
      softmax(scores).forEach((share, j) => {
        for (let c = 0; c < d; c++) mixed[mine + c] += share * v[j * narrow + theirs + c];
      });
    }
    return linear(mixed, weight("self_attn.o_proj"));
  }

  // Logits at some places of ids, a row for each; with `shift`, place i is answered by the vector at i - 1.
  function logits({ cfg, tensors }, ids, places, memory = []) {
    const embed = tensors["model.embed_tokens.weight"], head = tensors["lm_head.weight"] ?? embed;
    const width = cfg.hidden_size, epsilon = cfg.rms_norm_eps, x = new Float32Array(ids.length * width);
    const add = (y) => y.forEach((number, i) => { x[i] += number; }); // to the residual stream
    ids.forEach((id, i) => x.set(embed.data.subarray(id * width, (id + 1) * width), i * width));
    for (let n = 0; n < cfg.num_hidden_layers; n++) {
      const weight = (name) => tensors[`model.layers.${n}.${name}.weight`];
      add(attention(cfg, norm(x, weight("input_layernorm"), epsilon), weight, (memory[n] ??= { k: [], v: [] })));
      const y = norm(x, weight("post_attention_layernorm"), epsilon), up = linear(y, weight("mlp.up_proj"));
      const gated = linear(y, weight("mlp.gate_proj")).map((g, i) => (g / (1 + Math.exp(-g))) * up[i]); // SwiGLU
      add(linear(gated, weight("mlp.down_proj")));
    }
    const hidden = norm(x, tensors["model.norm.weight"], epsilon), from = places.map((i) => Math.max(0, i - cfg.shift));
    return from.map((i) => linear(hidden.subarray(i * width, (i + 1) * width), head));
  }

  // ---------- the tokenizer (chapter 01): byte-level BPE
  function makeTokenizer({ model: { vocab, merges }, added_tokens: special }) {
    const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;
    const rank = new Map(merges.map((pair, n) => [pair.join ? pair.join(" ") : pair, n]));
    let other = 256; // a visible byte stands for itself, any other for a letter from 256 on
    const visible = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    const letters = Array.from({ length: 256 }, (_, byte) => String.fromCharCode(visible(byte) ? byte : other++));
    const piece = Object.fromEntries(Object.entries(vocab).map(([text, id]) => [id, text]));
    const names = new Map(special.map(({ id, content }) => [id, content]));
    const encode = (text) => (text.match(WORDS) ?? []).flatMap((word) => {
      const parts = Array.from(new TextEncoder().encode(word), (byte) => letters[byte]);
      for (;;) { // join the pair that was learned first, until none is left that was learned
        const ranks = parts.slice(1).map((part, n) => rank.get(`${parts[n]} ${part}`) ?? Infinity);
        const best = Math.min(...ranks), at = ranks.indexOf(best);
        if (best === Infinity) return parts.map((part) => vocab[part]);
        parts.splice(at, 2, parts[at] + parts[at + 1]);
      }
    });
    const bytes = (id) => Uint8Array.from(piece[id] ?? "", (letter) => letters.indexOf(letter));
    return { encode, decode: (id) => names.get(id) ?? new TextDecoder().decode(bytes(id)) };
  }

  // ---------- writing (chapter 10)
  // Uniform numbers from a seed (Lehmer's generator).
  const generator = (state) => () => (state = (state * 48271) % 2147483647) / 2147483647;

  // A token for one place, never the mask: the likeliest of logits - T ln(-ln u); and its probability, in float32.
  function draw(logits, mask, heat, random) {
    logits[mask] = -Infinity;
    const scores = heat ? logits.map((l) => l - heat * Math.log(-Math.log(random()))) : logits;
    const token = scores.reduce((best, score, id) => (score > scores[best] ? id : best), 0);
    return { token, sure: Math.fround(softmax(Float64Array.from(logits))[token]) };
  }

  // A film is what a writer leaves: the ids; for each place the pass that wrote it and how sure it was; for each pass
  // its milliseconds and its proposals. Both writers yield the number of passes after each pass.
  const newFilm = (canvas) => ({ ids: [...canvas], when: [], sure: [], times: [], minds: [[]] });

  function* writeByDiffusion(model, film, { policy, steps, limit, heat, seed }) {
    const mask = model.cfg.mask_token_id, random = generator(seed + 1), { ids } = film;
    const total = ids.filter((id) => id === mask).length, passes = Math.min(steps, total);
    for (let pass = 1; ids.includes(mask); pass++) {
      const begun = performance.now(), places = ids.flatMap((id, i) => (id === mask ? [i] : []));
      const rows = logits(model, ids, places);
      const mind = places.map((place, n) => ({ place, ...draw(rows[n], mask, heat, random) }));
      const best = [...mind].sort((a, b) => b.sure - a.sure); // of equals the left one first
      const quota = Math.floor(total / passes) + (pass <= total % passes); // evenly, the remainder first
      const chosen = policy === "left" ? mind.slice(0, 1) : policy === "official" ? best.slice(0, quota)
        : best.filter(({ sure }, n) => n === 0 || sure >= limit);
      for (const { place: i, token, sure } of chosen) [ids[i], film.when[i], film.sure[i]] = [token, pass, sure];
      film.minds.push(mind);
      yield film.times.push(performance.now() - begun);
    }
  }

  function* writeLeftToRight(model, film, { heat, seed }) {
    const { mask_token_id: mask, eos_token_id: eos } = model.cfg, { ids } = film, room = ids.length;
    const start = ids.includes(mask) ? ids.indexOf(mask) : room, random = generator(seed + 1), memory = [];
    ids.length = start;
    for (let fresh = [...ids]; ids.length < room && ids.at(-1) !== eos; ) {
      const begun = performance.now(), [row] = logits(model, fresh, [fresh.length - 1], memory);
      const { token, sure } = draw(row, mask, heat, random);
      [film.when[ids.length], film.sure[ids.length], fresh] = [ids.length - start + 1, sure, [token]];
      ids.push(token);
      yield film.times.push(performance.now() - begun);
    }
  }

  function* writeBoth([model, twin], films, settings) {
    yield* writeByDiffusion(model, films[0], settings);
    yield* writeLeftToRight(twin, films[1], settings);
  }

  // ---------- the page
  const HIDE = { start: (i, n) => i < 0.42 * n, half: (i) => i % 2 === 0, all: () => true, none: () => false };

  function open(root, parts) {
    const [model, , { encode, decode }, controls] = parts, { mask_token_id: mask, eos_token_id: eos } = model.cfg;
    const form = Object.assign(document.createElement("form"), { className: "lucy-app", innerHTML: controls });
    const { play, pass, status, peek, prompt } = form.elements, all = (what) => [...form.querySelectorAll(what)];
    const around = (ids) => [model.cfg.bos_token_id, ...ids, eos], lucy = around(encode(root.dataset.story));
    let story, canvas; // the words that a click brings back (the mask where there is none); the same with holes
    let films, chips = [[], []], clock = 0, job = 0;

    // Lay the words out as wide as they will be in the end, so that nothing moves while the film runs.
    function lay() {
      const focused = chips[0].indexOf(document.activeElement);
      chips = all(".lucy-text").map((line, side) => {
        const { times } = films?.[side] ?? { times: [] }, each = (sum(times) / times.length).toFixed(1);
        line.nextElementSibling.textContent = films ? `${times.length} passes, ${each} ms each on this machine` : "";
        line.replaceChildren();
        return (films ? films[side].ids : canvas).map((id, i) => {
          const text = decode(id === mask ? story[i] : id), chip = document.createElement(side ? "span" : "button");
          Object.assign(chip, { type: "button", textContent: text.trim(), onclick: () => side || turn(i) });
          if (i === 0 || (i === lucy.length - 1 && id === eos)) return chip; // the ends are not shown
          if (i === 1 || !/^[.,']/.test(text)) line.append(document.createElement("span"));
          line.lastChild.append(chip); // a full stop stays with its word
          return chip;
        });
      });
      chips[0][focused]?.focus();
      show();
    }

    // Show the words as they are after the pass that is looked at.
    function show() {
      const now = Number(pass.value), first = canvas.indexOf(mask);
      chips.forEach((row, side) => row.forEach((chip, i) => {
        const film = films?.[side], when = film?.when[i], written = when <= now;
        const given = side && first > 0 ? i < first : canvas[i] !== mask;
        const guess = peek.checked && !written && film?.minds[now]?.find(({ place }) => place === i);
        const sure = Math.round(100 * (guess ? guess.sure : film?.sure[i])), word = guess ? decode(guess.token) : "";
        chip.title = written ? `pass ${when}, ${sure}% sure` : guess ? `guess: ${word}, ${sure}% sure` : "";
        chip.ariaLabel = `${given || written ? chip.textContent : "hidden word"} ${chip.title}`;
        chip.className = given ? "given" : written ? "written" : ["masked", "unwritten"][side];
        chip.classList.toggle("new", when === now);
        Object.assign(chip.dataset, { pass: written ? when : "", guess: word.trim() });
        chip.style.setProperty("--p", sure / 100);
      }));
      status.value = films ? `pass ${now} of ${pass.max}` : first < 0 ? "nothing is hidden" : "";
      status.ariaLive = clock ? "off" : "polite"; // nobody wants to hear every pass
      play.ariaLabel = clock ? "Pause" : "Play";
    }

    function stop() {
      clock = clearInterval(clock);
      show();
    }
    // A word or a setting has changed: forget the films.
    function renew() {
      [films, job, pass.max, pass.disabled] = [null, job + 1, 0, true];
      for (const slider of all("label > [type=range]")) slider.nextElementSibling.value = slider.value;
      stop();
      lay();
    }
    function hide(words, which) {
      story = words;
      canvas = words.map((id, i) => (i > 0 && i < words.length - 1 && which(i, words.length) ? mask : id));
      renew();
    }
    function turn(i) {
      canvas[i] = canvas[i] !== mask ? mask : story[i] !== mask ? story[i] : films?.[0].ids[i] ?? mask;
      renew();
    }

    // Write both films, with a rest after each pass so that the page stays awake; give up if something changes.
    async function write() {
      const mine = ++job, pair = [newFilm(canvas), newFilm(canvas)], number = (x) => (isNaN(x) ? x : Number(x));
      const settings = Object.fromEntries([...new FormData(form)].map(([name, value]) => [name, number(value)]));
      for (const count of writeBoth(parts, pair, settings)) {
        status.value = `thinking, pass ${count}`;
        await new Promise((done) => setTimeout(done));
        if (mine !== job) return;
      }
      [films, pass.disabled, pass.max] = [pair, false, Math.max(...pair.map(({ times }) => times.length))];
      lay();
    }

    play.onclick = async () => {
      if (clock || !canvas.includes(mask)) return stop();
      if (!films) await write();
      if (!films || clock) return;
      if (pass.value === pass.max) pass.value = 0;
      clock = setInterval(() => (pass.value++, show(), pass.value === pass.max && stop()), 300);
      show();
    };
    for (const button of all("[name=hide]")) button.onclick = () => hide(lucy, HIDE[button.value]);
    form.oninput = ({ target }) => {
      if (target !== prompt) (target === pass ? stop : target === peek ? show : renew)();
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      const begun = encode(prompt.value.trim()), room = lucy.length - 2 - begun.length;
      if (room > 0) hide(around([...begun, ...Array(room).fill(mask)]), HIDE.none);
      else status.value = `too long by ${1 - room}`;
    };
    root.replaceChildren(form);
    hide(lucy, HIDE.start);
  }

  const root = document.querySelector(".lucy");
  if (!root) return;
  const { model, twin } = root.dataset, words = read(`${model}/tokenizer.json`, "json").then(makeTokenizer);
  const ready = Promise.all([readModel(model), readModel(twin), words, read("lucy.html", "text")]);
  document.head.insertAdjacentHTML("beforeend", `<link rel="stylesheet" href="${new URL("lucy.css", HERE)}">`);
  ready.then((parts) => open(root, parts), ({ message }) => root.append(
    `The models could not be loaded (${message}), so this is a film of one of them. A page opened as a file may not `
    + "read its neighbours: serve its folder, for example by python -m http.server, and open it from there."));
  window.lucy = { ready, logits, newFilm, writeBoth }; // for tests, and for the curious
})();
