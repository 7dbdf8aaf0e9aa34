
// Keeps the page of a job as it is now: asks for it again when something happens, and puts what is
// new in its place. Without scripts, the browser loads the page again by itself.
(() => {
  if (!document.querySelector("[data-moves]")) return;
  const away = document.getElementById("away");
  const events = new EventSource(document.querySelector("[data-events]").dataset.events);
  let timer = null;

  function stop() {
    events.close();
    clearTimeout(timer);
    timer = null;
  }

  function soon(milliseconds) {
    clearTimeout(timer);
    timer = setTimeout(refresh, milliseconds);
  }

  function put(fresh) {
    let above = null;
    for (const found of fresh.querySelectorAll("[data-live]")) {
      const old = document.getElementById(found.id);
      if (old === null) {
        above.after(document.importNode(found, true));
      } else if (found.innerHTML !== old.innerHTML && !old.contains(document.activeElement)) {
        for (const each of old.querySelectorAll("details[open]")) {
          fresh.getElementById(each.id)?.setAttribute("open", "");
        }
        old.replaceChildren(...found.childNodes);
      }
      above = document.getElementById(found.id);
    }
    for (const old of document.querySelectorAll("[data-live]")) {
      if (fresh.getElementById(old.id) === null) old.remove();
    }
    document.title = fresh.title;
  }

  async function refresh() {
    try {
      const answer = await fetch(location.pathname, { headers: { Accept: "text/html" } });
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
      if (fresh.querySelector("[data-moves]")) soon(3000);
      else stop();
    } catch {
      away.hidden = false;
      soon(3000);
    }
  }

  for (const kind of ["state", "stage", "progress", "retry"]) {
    events.addEventListener(kind, () => soon(300));
  }
  soon(3000);
})();
