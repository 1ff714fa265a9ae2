/* Calls itself without end. */
int deeper(volatile int *above)
{
    volatile int here = *above + 1;
    return deeper(&here) + here;
}

void _start(void)
{
    volatile int zero = 0;
    deeper(&zero);
}
