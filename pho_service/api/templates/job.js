{% include "live.js" %}

// Tells what a mark of a chart is, to a pointer and to keys; copies commands; opens what is linked.
(() => {
  document.documentElement.classList.add("scripted");
  const tip = document.getElementById("tip");
  let current = null, hiding = null;

  function marks(frame) {
    for (const title of frame.querySelectorAll("svg.chart title")) { // else the browser shows it, too
      title.parentElement.dataset.told = title.textContent;
      title.remove();
    }
    return [...frame.querySelectorAll("[data-told]")];
  }

  function trialAt(mark) { // the address of its trial in the dashboard
    const studies = mark.closest("[data-studies]")?.dataset.studies.split(" ");
    if (studies === undefined || mark.dataset.trial === undefined) return null;
    const number = Number(mark.dataset.trial);
    const study = studies[number % studies.length];
    return `/dashboard/studies/${study}/trials?numbers=${Math.floor(number / studies.length)}`;
  }

  function show(mark) {
    clearTimeout(hiding);
    current?.classList.remove("current");
    current = mark;
    mark.classList.add("current");
    const [first, ...rest] = mark.dataset.told.split("; ");
    const head = document.createElement("strong");
    head.textContent = first;
    tip.replaceChildren(head, rest.join("; "));
    const address = trialAt(mark);
    if (address !== null) {
      const link = document.createElement("a");
      link.href = address;
      link.textContent = "Open the trial in the dashboard";
      tip.append(document.createElement("br"), link);
    }
    tip.hidden = false;
    const place = mark.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth - size.width - 8;
    const left = Math.max(8, Math.min(room, place.left + place.width / 2 - size.width / 2));
    const above = place.top - size.height - 6;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 0 ? above : place.bottom + 6) + scrollY}px`;
  }

  function hide() {
    clearTimeout(hiding);
    current?.classList.remove("current");
    current = null;
    tip.hidden = true;
  }

  document.addEventListener("pointerover", ({ target }) => {
    const frame = target.closest?.(".points");
    if (frame) marks(frame);
    const mark = target.closest?.("[data-told]");
    if (mark) show(mark);
    else if (target === tip || tip.contains(target)) clearTimeout(hiding);
    else if (current !== null && !current.closest(".points").matches(":focus")) {
      clearTimeout(hiding);
      hiding = setTimeout(hide, 300); // time enough to reach the link
    }
  });

  document.addEventListener("focusin", ({ target }) => {
    if (target.matches(".points")) {
      const all = marks(target);
      if (all.length) show(all.find((mark) => mark.matches(".ring")) ?? all[0]);
    } else if (!tip.contains(target)) hide();
  });

  document.addEventListener("keydown", (event) => {
    for (const menu of document.querySelectorAll(".menu[open]")) {
      if (event.key !== "Escape") continue;
      menu.open = false;
      menu.querySelector("summary").focus();
    }
    if (event.key === "Escape") return hide();
    if (!event.target.matches(".points") || current === null) return;
    const all = marks(event.target).sort((a, b) => middle(a) - middle(b));
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" && trialAt(current) !== null) location.href = trialAt(current);
    if (step === undefined) return;
    event.preventDefault();
    show(all[(all.indexOf(current) + step + all.length) % all.length]);
  });

  function middle(mark) {
    const place = mark.getBoundingClientRect();
    return place.left + place.width / 2;
  }

  document.addEventListener("click", async ({ target }) => {
    for (const menu of document.querySelectorAll(".menu[open]")) {
      if (!menu.contains(target)) menu.open = false;
    }
    if (!target.matches(".copy")) return;
    const text = target.parentElement.querySelector("pre");
    if (navigator.clipboard) await navigator.clipboard.writeText(text.textContent);
    else { // of a page that came by HTTP from another machine
      getSelection().selectAllChildren(text);
      document.execCommand("copy");
    }
    target.textContent = "Copied";
    setTimeout(() => { target.textContent = "Copy"; }, 2000);
  });

  function open() {
    const section = location.hash ? document.getElementById(location.hash.slice(1)) : null;
    if (section?.localName === "details") section.open = true;
  }
  addEventListener("hashchange", open);
  open();
})();
