new MutationObserver(() => {
  const all = (which) => document.querySelectorAll(which);
  for (const each of all("button:has([data-testid=ChevronLeftIcon])")) each.ariaLabel = "close";
  for (const each of all("button:has([data-testid=FilterListIcon])"))
    each.ariaLabel = `filter ${each.parentElement.textContent}`;
  for (const each of all("[role=combobox]:not([aria-label])")) each.ariaLabel = each.textContent;
  for (const each of all("input[type=range]:not([aria-label])")) each.ariaLabel = "Number";
  for (const each of all("main .MuiSwitch-input:not(label *)")) each.ariaLabel = "Slice";
  for (const each of all("ul > hr")) each.ariaHidden = "true";
  for (const each of all("main ul > div:has(> li)")) {
    each.role = "list";
    each.parentElement.role = "none";
  }
  for (const each of all("main :is(.MuiBox-root, .MuiCard-root):not([tabindex])"))
    if (/auto|scroll/.test(getComputedStyle(each).overflowY)) each.tabIndex = 0; // for keys
  const ground = getComputedStyle(document.body).backgroundColor;
  document.body.classList.toggle("light", ground === "rgb(255, 255, 255)");
}).observe(document, { childList: true, subtree: true });
