// Keeps what stands beside the form as what is typed: asks the service for the form as it would be,
// and takes the plan, the commands and the defaults that follow from the model from there. Without
// scripts, the button "Check and plan" does the same.
(() => {
  const QUIET_MS = 400;
  let timer = null;
  let last = 0;

  async function ask(quiet) {
    const mine = ++last;
    clearTimeout(timer);
    const fields = new URLSearchParams(new FormData(document.getElementById("job")));
    if (quiet) fields.set("quiet", "on");
    const answer = await fetch("/new/check", {
      method: "POST",
      body: fields,
      headers: { Accept: "text/html" },
    });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (page.getElementById("job") === null) throw new Error(page.title); // a login, an outage
    return mine === last ? page : null;
  }

  function put(page) {
    for (const fresh of page.querySelectorAll("[data-live]")) {
      const old = document.getElementById(fresh.id);
      for (const each of old.querySelectorAll("details[id]")) {
        const same = page.getElementById(each.id);
        if (same !== null) same.open = each.open;
      }
      if (fresh.innerHTML !== old.innerHTML) old.replaceChildren(...fresh.childNodes);
    }
    for (const fresh of page.querySelectorAll("input[placeholder]")) {
      const old = document.getElementById(fresh.id);
      old.placeholder = fresh.placeholder;
      const hint = page.getElementById(`${fresh.id}-hint`);
      document.getElementById(hint.id).replaceChildren(...hint.childNodes);
    }
  }

  // Uploads need this script: without it, a text is uploaded by `curl` or `pho submit`.
  function offer() {
    for (const each of document.querySelectorAll("[data-upload]")) each.hidden = false;
  }

  async function upload(input) {
    const place = input.closest("[data-upload]");
    const said = place.querySelector("[role=status]");
    const [file] = input.files;
    if (file === undefined) return;
    said.textContent = `Uploading ${file.name}`;
    const name = file.name.replace(/[^\p{L}\p{N}_ .()+,=@~-]/gu, "_").slice(-200);
    try {
      const answer = await fetch(`/v1/texts?name=${encodeURIComponent(name)}`, {
        method: "POST",
        body: file,
        headers: { "Content-Type": "application/octet-stream" },
      });
      const text = await answer.json();
      said.textContent = answer.ok ? `${file.name} is uploaded.` : text.detail;
      if (!answer.ok) return;
      const field = document.getElementById(place.dataset.upload);
      const lines = field.tagName === "TEXTAREA" ? field.value.split("\n").filter(Boolean) : [];
      field.value = [...lines, text.id].join("\n");
      field.dispatchEvent(new Event("input", { bubbles: true }));
    } catch {
      said.textContent = "The service cannot be reached. Try again.";
    }
  }

  offer();
  document.addEventListener("change", (event) => {
    if (event.target.type === "file") upload(event.target);
  });

  document.addEventListener("input", (event) => {
    if (event.target.form === null || event.target.type === "file") return;
    clearTimeout(timer);
    timer = setTimeout(async () => {
      try {
        const page = await ask(true);
        if (page !== null) put(page);
      } catch {
        // The service is away for the moment; the buttons say so.
      }
    }, QUIET_MS);
  });

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-check]");
    if (button === null) return;
    event.preventDefault();
    try {
      const page = await ask(false);
      if (page === null) return;
      if (page.querySelector(".problem") === null) {
        document.querySelector(".problem")?.remove();
        for (const each of document.querySelectorAll("#job .wrong[id]")) each.remove();
        for (const each of document.querySelectorAll("[aria-invalid]")) {
          each.removeAttribute("aria-invalid");
        }
        put(page);
        document.title = page.title;
        document.getElementById("plan").scrollIntoView({ block: "nearest" });
      } else {
        page.querySelector(".problem").removeAttribute("autofocus");
        document.getElementById("main").replaceChildren(...page.getElementById("main").childNodes);
        document.title = page.title;
        offer();
        document.querySelector(".problem").focus();
      }
    } catch {
      button.form.action = button.formAction;
      button.form.submit(); // the browser shows what is wrong
    }
  });
})();
