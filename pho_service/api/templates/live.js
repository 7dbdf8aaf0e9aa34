
// Keeps a page as it is now: asks for it again when something happens, and puts what is new in its
// place; what is chosen, and where the focus is, stays. Without scripts, the browser loads the page
// again by itself.
(() => {
  const all = document.getElementById("all");
  if (all !== null) {
    all.hidden = false;
    all.addEventListener("change", () => {
      for (const box of document.querySelectorAll("[data-rows] [type=checkbox]")) box.checked = all.checked;
    });
  }
  if (!document.querySelector("[data-moves]")) return;
  const away = document.getElementById("away");
  const followed = document.querySelector("[data-events]");
  const events = followed === null ? null : new EventSource(followed.dataset.events);
  let timer = null;

  function every() { // milliseconds between two looks; none while nothing moves
    const found = document.querySelector("[data-moves]");
    return found === null ? 0 : 1000 * (Number(found.dataset.moves) || 3);
  }

  function stop() {
    if (events !== null) events.close();
    clearTimeout(timer);
    timer = null;
  }

  function soon(milliseconds) {
    clearTimeout(timer);
    timer = setTimeout(refresh, milliseconds);
  }

  function put(fresh) {
    for (const found of fresh.querySelectorAll("[data-live]")) {
      const old = document.getElementById(found.id);
      if (old !== null) renew(old, found, fresh);
      else {
        const above = found.previousElementSibling; // which has been put there, or stood there
        const copy = document.importNode(found, true);
        if (above !== null) document.getElementById(above.id).after(copy);
        else document.getElementById(found.parentElement.id).prepend(copy);
      }
    }
    for (const old of document.querySelectorAll("[data-live]")) {
      if (fresh.getElementById(old.id) === null) old.remove();
    }
    document.title = fresh.title;
  }

  function renew(old, found, fresh) {
    if ("moves" in found.dataset) old.dataset.moves = found.dataset.moves;
    else delete old.dataset.moves;
    const rows = old.querySelector("[data-rows]");
    const now = found.querySelector("[data-rows]");
    if (rows !== null && now !== null) return renewRows(rows, now);
    const held = document.activeElement;
    const fold = old.contains(held) && held.localName === "summary" ? held.parentElement.id : "";
    if (found.innerHTML === old.innerHTML || (old.contains(held) && fold === "")) return;
    for (const each of old.querySelectorAll("details")) {
      fresh.getElementById(each.id)?.toggleAttribute("open", each.open);
    }
    old.replaceChildren(...found.childNodes);
    if (fold !== "") document.getElementById(fold)?.querySelector("summary").focus();
  }

  function renewRows(rows, now) {
    for (const old of [...rows.children]) {
      if (![...now.children].some((each) => each.id === old.id)) old.remove();
    }
    [...now.children].forEach((found, place) => {
      const old = document.getElementById(found.id);
      const row = old === null ? document.importNode(found, true) : old;
      if (rows.children[place] !== row) rows.insertBefore(row, rows.children[place] ?? null);
      if (old === null) return;
      const cells = [...found.cells];
      if (cells.length !== old.cells.length) old.replaceChildren(old.cells[0], ...cells.slice(1));
      else cells.forEach((cell, number) => {
        const was = old.cells[number];
        if (number > 0 && was.outerHTML !== cell.outerHTML && !was.contains(document.activeElement)) was.replaceWith(cell);
      });
    });
  }

  async function refresh() {
    if (document.hidden) return soon(1000);
    try {
      const answer = await fetch(location.pathname + location.search, { headers: { Accept: "text/html" } });
      if (answer.status >= 500) throw new Error(answer.statusText);
      const left = answer.redirected && new URL(answer.url).pathname !== location.pathname;
      if (left || answer.status === 401) { // what the page shows stays, so that nothing is lost
        stop();
        away.hidden = true;
        document.getElementById("expired").hidden = false;
        return;
      }
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      away.hidden = true;
      if (!answer.ok) { // it was deleted, or the key opens nothing any more: that page says so
        stop();
        document.getElementById("main").replaceChildren(...fresh.getElementById("main").childNodes);
        return;
      }
      put(fresh);
      if (every()) soon(every());
      else stop();
    } catch {
      away.hidden = false;
      soon(3000);
    }
  }

  for (const kind of ["state", "stage", "progress", "retry", "put_down"]) {
    if (events !== null) events.addEventListener(kind, () => soon(300));
  }
  soon(every());
})();
