// What the whole page does in the browser: the tab's key, links, the queue, and a lost server.
window.aoft = (() => {
  const names = __TABS__;
  const links = { prove: "skills", memory: "skills" }; // links to a part of a tab
  const linked = {}; // the task that a link names, by tab
  let go = () => {};

  // The key of this browser tab: 128 random bits. It is sent in the body of one request only.
  function key() {
    try {
      const kept = sessionStorage.getItem("aoft-demo");
      if (/^[0-9a-f]{32}$/.test(kept ?? "")) return kept;
      const bytes = crypto.getRandomValues(new Uint8Array(16));
      const made = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      sessionStorage.setItem("aoft-demo", made);
      return made;
    } catch {
      return ""; // without storage, the session ends with the page
    }
  }

  function notice(id, role, html) {
    let box = document.getElementById(id);
    if (!box) {
      box = Object.assign(document.createElement("div"), { id });
      box.setAttribute("role", role);
      document.body.append(box);
    }
    if (box.innerHTML !== html) box.innerHTML = html;
    box.hidden = !html;
  }

  // Why a file cannot be sent, or "". Gradio's own check would cover the tabs with its message.
  function tooLarge(file, name) {
    const most = window.gradio_config?.max_file_size ?? Infinity;
    if (file.size <= most) return "";
    const size = (bytes) => `${Math.round(bytes / 2 ** 20)} MB`;
    return `${name} was not sent: it has ${size(file.size)}, and the demo takes at most ${size(most)}.`;
  }

  // Links: #race, #skills/NAME. The back button returns to the tab before.
  const overflow = () => [...document.querySelectorAll("#tabs > .tab-wrapper .overflow-dropdown button")];
  const tabButton = (tab) => document.getElementById(`tab-${tab}-button`)
    ?? overflow().find((button) => button.textContent.trim() === names[tab]);

  function tabOf(target) {
    if (target.closest?.("#tabs > .tab-wrapper [role=tab]")) return target.closest("[role=tab]").dataset.tabId;
    const text = target.closest?.("#tabs > .tab-wrapper .overflow-dropdown button")?.textContent.trim();
    return Object.keys(names).find((tab) => names[tab] === text);
  }

  function parsed() {
    const [first, ...rest] = location.hash.slice(1).split("/");
    try {
      return [links[first] ?? (first || "ask"), decodeURIComponent(rest.join("/")), first];
    } catch {
      return [first, "", first];
    }
  }

  async function seen(selector) {
    for (let tries = 0; tries < 50; tries += 1) {
      const found = document.querySelector(selector);
      if (found?.offsetParent) return found;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    return null;
  }

  async function follow() {
    const [tab, name, first] = parsed();
    const button = tabButton(tab);
    if (!button) return;
    if (button.getAttribute("aria-selected") !== "true") button.click();
    if (first === "prove") (await seen("#rows [data-ready] [data-act=proved]"))?.click();
    if (first === "memory") (await seen("#rows .memory"))?.scrollIntoView({ block: "center" });
    if (!name) return;
    linked[tab] = name;
    if (tab === "skills") {
      const row = await seen(`#rows [data-task="${CSS.escape(name)}"]`);
      for (const other of document.querySelectorAll("#rows .linked")) other.classList.remove("linked");
      row?.classList.add("linked");
      row?.scrollIntoView({ block: "center" });
    } else if (await seen(`#tab-${tab} .form, #tab-${tab} .block`)) {
      go();
    }
  }

  function chosen(tabs, values) {
    const next = tabs.map((tab, index) => linked[tab] ?? values[index]);
    for (const tab of tabs) delete linked[tab];
    return next.length === 1 ? next[0] : next;
  }

  function name(tab, task) {
    if (parsed()[0] !== tab || !task) return;
    history.replaceState(null, "", `#${tab}/${encodeURIComponent(task)}`);
  }

  addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {
    const tab = tabOf(event.target);
    if (tab && event.isTrusted && parsed()[0] !== tab) history.pushState(null, "", `#${tab}`);
    const copy = event.target.closest?.(".copy");
    if (copy) {
      navigator.clipboard?.writeText(copy.closest("figure").querySelector("pre").textContent);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    }
  });

  // The queue: Gradio's stream says how many requests are before each of ours.
  const waiting = new Map();

  function hear(message) {
    if (!message.event_id) return;
    if (message.msg === "estimation") waiting.set(message.event_id, message.rank ?? 0);
    else waiting.delete(message.event_id);
    const before = Math.max(0, ...waiting.values());
    notice("queue", "status", before ? `${before} request${before > 1 ? "s" : ""} before yours` : "");
  }

  async function listen(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (text + value).split("\n");
      text = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) try { hear(JSON.parse(line.slice(5))); } catch { /* not ours */ }
      }
    }
  }

  const plainFetch = window.fetch;
  window.fetch = async (...request) => {
    const response = await plainFetch(...request);
    const address = String(request[0]?.url ?? request[0]);
    if (!address.includes("/queue/data") || !response.body) return response;
    const [ours, theirs] = response.body.tee();
    listen(ours).catch(() => {});
    return new Response(theirs, response);
  };

  // A lost server: a banner that goes when it is back.
  let started = null;
  let failures = 0;

  async function check() {
    if (document.hidden) return;
    try {
      const answer = await plainFetch("aoft/alive", { cache: "no-store", signal: AbortSignal.timeout(8000) });
      const { start } = await answer.json();
      started ??= start;
      failures = 0;
      notice("lost", "alert", start === started ? "" :
        'The demo was started again. <a href="">Load the page again</a> to go on.');
    } catch {
      failures += 1;
      if (failures > 1) notice("lost", "alert",
        "<b>The demo does not answer.</b> It may have been stopped. This page goes on when it is back.");
    }
  }

  setInterval(check, 3000);

  return { key, tooLarge, chosen, name, follow, ready: (trigger) => { go = trigger; follow(); } };
})();
