new MutationObserver(() => {
  const all = (which) => document.querySelectorAll(which);
  for (const each of all("button:has([data-testid=ChevronLeftIcon])")) each.ariaLabel = "close";
  for (const each of all("[role=combobox]:not([aria-label])")) each.ariaLabel = each.textContent;
  for (const each of all("input[type=range]:not([aria-label])")) each.ariaLabel = "Number";
  for (const each of all("ul > hr")) each.ariaHidden = "true";
  const ground = getComputedStyle(document.body).backgroundColor;
  document.body.classList.toggle("light", ground === "rgb(255, 255, 255)");
}).observe(document, { childList: true, subtree: true });
