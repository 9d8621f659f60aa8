"use strict";
// The moving parts of the page: judge and theme, sortable tables, and the replies, drawn a few at a time.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const PAGE = 25;
  const colours = data.systems.map((_, i) => "c" + (i % 8));
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // ---- theme: as the system has it, until somebody chooses; a file:// page may have no storage
  const themes = ["auto", "light", "dark"];
  let theme = 0;
  try { theme = Math.max(0, themes.indexOf(localStorage.getItem("postalign-theme"))); } catch { /* no storage */ }
  const paint = () => {
    if (theme) document.documentElement.dataset.theme = themes[theme];
    else delete document.documentElement.dataset.theme;
    $("theme").textContent = "theme: " + themes[theme];
  };
  $("theme").addEventListener("click", () => {
    theme = (theme + 1) % 3;
    try { localStorage.setItem("postalign-theme", themes[theme]); } catch { /* no storage */ }
    paint();
  });
  paint();

  // ---- tables: a click on a head sorts by that column, a second one the other way round
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const given = cell.dataset.value !== undefined ? cell.dataset.value : cell.textContent.trim();
    const number = parseFloat(given);
    return Number.isNaN(number) ? given.toLowerCase() : number;
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
    return typeof a === "number" ? -1 : 1;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    table.tHead.rows[0].querySelectorAll("th").forEach((head, column) => {
      head.tabIndex = 0;
      const sort = () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const keyed = [...body.rows].map((row) => [valueOf(row, column), row]);
        keyed.sort((a, b) => (down ? compare(b[0], a[0]) : compare(a[0], b[0])));
        body.append(...keyed.map(([, row]) => row));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
      });
    });
  }

  // ---- judge: what depends on it is there for each, and one is shown
  let judge = 0, draw = null;
  const chooseJudge = (index) => {
    judge = index;
    for (const view of document.querySelectorAll(".view")) view.hidden = Number(view.dataset.judge) !== judge;
    for (const title of document.querySelectorAll("[data-part]")) { // the menu leads to what is shown
      if (title.closest("[hidden]")) title.removeAttribute("id");
      else title.id = title.dataset.part;
    }
    if ($("judge")) $("judge").value = String(judge);
  };
  if ($("judge")) $("judge").addEventListener("change", () => { chooseJudge(Number($("judge").value)); if (draw) draw(); });

  // ---- replies
  if (!$("list")) return;
  const [PROMPT, SYSTEM, SEED, TEXT, VERDICTS, REASONS, TOKENS, GATE, ROUGE] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
  const [SUITE, LABEL, KIND, WRAPPER, GROUP, ASK] = [0, 1, 2, 3, 4, 5];
  const byPrompt = data.prompts.map(() => []);
  for (const reply of data.replies) byPrompt[reply[PROMPT]].push(reply);
  for (const replies of byPrompt) replies.sort((a, b) => a[SEED] - b[SEED] || a[SYSTEM] - b[SYSTEM]);
  const base = data.systems.map((name) => data.bases.includes(name));
  const word = (index) => (index < 0 ? "not read" : data.verdicts[index]);

  const chosen = { text: "", suite: -1, label: -1, system: -1, verdict: -1, kind: -1, wrapper: -1, differ: false, disagree: false, pair: null };
  const filters = $("filters"), ticks = $("ticks"), controls = {};
  const picker = (name, title, options) => {
    if (options.length < 2) return;
    const label = make("label", "", title), select = make("select");
    select.append(new Option("any", "-1"), ...options.map(([text, value]) => new Option(text, String(value))));
    select.addEventListener("change", () => { chosen[name] = Number(select.value); chosen.pair = null; draw(); });
    label.append(select);
    filters.append(label);
    controls[name] = select;
  };
  const search = make("input");
  search.type = "search";
  search.placeholder = "words in prompts and replies";
  let wait = 0;
  search.addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(() => { chosen.text = search.value.trim().toLowerCase(); draw(); }, 150);
  });
  const searching = make("label", "wide", "search");
  searching.append(search);
  filters.append(searching);
  const numbered = (names, none) => names.map((name, i) => [name === null ? none : name, i]);
  picker("suite", "suite", numbered(data.suites, "none"));
  picker("label", "prompts", numbered(data.labels, "no label").filter(([, i]) => data.prompts.some((p) => p[LABEL] === i)));
  picker("system", "system", numbered(data.systems));
  picker("verdict", "verdict", numbered(data.verdicts));
  picker("kind", "category", numbered(data.kinds, "none"));
  picker("wrapper", "wrapper", numbered(data.wrappers, "none"));
  const tick = (name, title) => {
    const label = make("label"), box = make("input");
    box.type = "checkbox";
    box.addEventListener("change", () => { chosen[name] = box.checked; draw(); });
    label.append(box, " " + title);
    ticks.append(label);
    controls[name] = box;
  };
  if (data.systems.length > 1) tick("differ", "systems differ");
  if (data.judges.length > 1) tick("disagree", "judges disagree");
  const clear = make("button", "", "clear filters");
  clear.type = "button";
  clear.addEventListener("click", () => { reset(); draw(); });
  ticks.append(clear);
  const reset = () => {
    Object.assign(chosen, { text: "", suite: -1, label: -1, system: -1, verdict: -1, kind: -1, wrapper: -1, differ: false, disagree: false, pair: null });
    search.value = "";
    for (const control of Object.values(controls)) if (control.type === "checkbox") control.checked = false; else control.value = "-1";
  };

  const split = (reply) => new Set(reply[VERDICTS].filter((v) => v >= 0)).size > 1;
  const fits = (index) => {
    const prompt = data.prompts[index], replies = byPrompt[index];
    for (const [name, at] of [["suite", SUITE], ["label", LABEL], ["kind", KIND], ["wrapper", WRAPPER]])
      if (chosen[name] >= 0 && prompt[at] !== chosen[name]) return false;
    if (chosen.system >= 0 || chosen.verdict >= 0) {
      const one = (r) => (chosen.system < 0 || r[SYSTEM] === chosen.system) && (chosen.verdict < 0 || r[VERDICTS][judge] === chosen.verdict);
      if (!replies.some(one)) return false;
    }
    if (chosen.differ && new Set(replies.map((r) => r[VERDICTS][judge])).size < 2) return false;
    if (chosen.disagree && !replies.some(split)) return false;
    if (chosen.pair && !replies.some((r) => r[VERDICTS][chosen.pair[0]] === chosen.pair[2] && r[VERDICTS][chosen.pair[1]] === chosen.pair[3])) return false;
    if (chosen.text) {
      const has = (text) => text !== null && text.toLowerCase().includes(chosen.text);
      if (!has(prompt[ASK]) && !replies.some((r) => has(r[TEXT]))) return false;
    }
    return true;
  };

  // where two texts part: the beginning of the first word of `text` that `other` does not have at that place
  const parting = (text, other) => {
    const mine = [...text.matchAll(/\S+/g)], theirs = other.match(/\S+/g) || [];
    for (let i = 0; i < mine.length; i++) if (mine[i][0] !== theirs[i]) return [mine[i].index, mine[i][0].length];
    return theirs.length > mine.length ? [text.length, 0] : null;
  };
  const body = (reply, before) => {
    const pre = make("pre"), text = reply[TEXT];
    const at = before === null ? null : parting(text, before);
    if (at === null) { pre.textContent = text || "(empty)"; return pre; }
    const mark = make("mark", "", at[1] ? text.slice(at[0], at[0] + at[1]) : "(ends here)");
    mark.title = "first difference from the base";
    pre.append(text.slice(0, at[0]), mark, text.slice(at[0] + at[1]));
    return pre;
  };
  const replyCard = (reply, prompt, before, seeds) => {
    const card = make("section", "reply"), head = make("h4");
    head.append(make("span", "dot " + colours[reply[SYSTEM]]), data.systems[reply[SYSTEM]] + (seeds ? ", seed " + reply[SEED] : ""));
    card.append(head);
    const said = make("div", "where");
    reply[VERDICTS].forEach((verdict, i) => {
      if (i) said.append("; ");
      const why = reply[REASONS][i] >= 0 ? data.reasons[reply[REASONS][i]] : "";
      said.append((data.judges.length > 1 ? data.judges[i] + ": " : ""), make("span", word(verdict), word(verdict)), why ? " (" + why + ")" : "");
    });
    said.append(`; ${reply[TOKENS]} tokens`, reply[GATE] === null ? "" : `; gate ${reply[GATE]}`, reply[ROUGE] === null ? "" : `; ROUGE-L ${reply[ROUGE].toFixed(2)}`);
    card.append(said);
    if (reply[TEXT] === null) { card.append(make("p", "note", "left out of this file")); return card; }
    if (data.labels[prompt[LABEL]] === "benign") { card.append(body(reply, before)); return card; }
    const fold = make("details");
    fold.append(make("summary", "", "show the reply"));
    fold.addEventListener("toggle", () => { if (fold.open && fold.childElementCount < 2) fold.append(body(reply, before)); });
    card.append(fold);
    return card;
  };
  const promptCard = (index) => {
    const prompt = data.prompts[index], replies = byPrompt[index];
    const label = data.labels[prompt[LABEL]];
    const card = make("article", "prompt " + (label || "unlabelled")), head = make("header");
    const where = [data.suites[prompt[SUITE]], label || "no label", data.kinds[prompt[KIND]], data.wrappers[prompt[WRAPPER]], data.groups[prompt[GROUP]]];
    head.append(make("div", "where", where.filter((part) => part).join(" · ")), make("div", "ask", prompt[ASK]));
    card.append(head);
    const grid = make("div", "replies"), seeds = new Set(replies.map((r) => r[SEED])).size > 1;
    for (const reply of replies) {
      const twin = replies.find((r) => base[r[SYSTEM]] && r[SEED] === reply[SEED]);
      const before = twin && twin !== reply && twin[TEXT] !== null && reply[TEXT] !== null ? twin[TEXT] : null;
      grid.append(replyCard(reply, prompt, before, seeds));
    }
    card.append(grid);
    return card;
  };

  let found = [], shown = 0;
  const more = () => {
    const next = found.slice(shown, shown + PAGE);
    $("list").append(...next.map(promptCard));
    shown += next.length;
    $("more").hidden = shown >= found.length;
    $("more").textContent = `more (${found.length - shown} left)`;
  };
  draw = () => {
    found = data.prompts.map((_, i) => i).filter(fits);
    shown = 0;
    $("list").replaceChildren();
    $("found").textContent = `${found.length} of ${data.prompts.length} prompts, ${data.replies.length} replies in all`;
    more();
  };
  $("more").addEventListener("click", more);
  if ("IntersectionObserver" in window)
    new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting) && !$("more").hidden) more(); }, { rootMargin: "600px" }).observe($("more"));
  for (const button of document.querySelectorAll("button.read"))
    button.addEventListener("click", () => {
      const { first, second, a, b } = button.dataset;
      reset();
      chosen.pair = [data.judges.indexOf(first), data.judges.indexOf(second), data.verdicts.indexOf(a), data.verdicts.indexOf(b)];
      draw();
      $("replies").scrollIntoView();
    });
  draw();
})();
