; echo: types back what is typed at its serial port; Ctrl-D ends it
;@ entry real16
;
; In real mode, because there it may handle interrupts and halt in between: a guest that waits costs nothing.
; Needs the machine's interrupt controller. Loaded at 0:7c00.

    bits 16
    org 0x7c00

SERIAL    equ 0x3f8             ; the UART's registers: data +0, interrupts +1, modem +4, line status +5
EXIT      equ 0xf4              ; a byte written here ends the guest with that status
PIC       equ 0x20              ; the first interrupt controller; its mask is the next port
IVT_OFFSET equ 0x24 * 4         ; where the handler of IRQ 4 is named: its vector is 0x24
IVT_SEGMENT equ 0x24 * 4 + 2
CTRL_D    equ 4

    cli
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7c00
    jmp start

greeting:
    db "Type, and I type it back. Ctrl-D ends me.", 13, 10, 0

; IRQ 4: the UART has bytes for us.
handler:
    mov dx, SERIAL + 5
    in al, dx
    test al, 1                          ; received data is ready
    jz none_left
    mov dx, SERIAL
    in al, dx
    cmp al, CTRL_D
    je end
    mov cl, al
echo:
    mov dx, SERIAL + 5
    in al, dx
    test al, 0x20                       ; THRE: the transmit register takes another byte
    jz echo
    mov dx, SERIAL
    mov al, cl
    out dx, al
    cmp al, 13
    jne handler
    mov cl, 10                          ; a terminal's Return key sends 13 only
    jmp echo
none_left:
    mov al, 0x20                        ; end of interrupt
    out PIC, al
    iret

end:
    xor al, al
    out EXIT, al

start:
    mov word [IVT_SEGMENT], ax
    mov ax, handler
    mov word [IVT_OFFSET], ax

    mov al, 0x11                        ; initialise: four command words follow
    out PIC, al
    mov al, 0x20                        ; IRQ 0 is vector 0x20
    out PIC + 1, al
    mov al, 4                           ; the second controller is at IRQ 2
    out PIC + 1, al
    mov al, 1                           ; 8086 mode
    out PIC + 1, al
    mov al, 0xef                        ; all masked but IRQ 4
    out PIC + 1, al

    mov si, greeting
greet:
    mov cl, byte [si]
    test cl, cl
    jz greeted
    mov dx, SERIAL + 5
greet_wait:
    in al, dx
    test al, 0x20
    jz greet_wait
    mov dx, SERIAL
    mov al, cl
    out dx, al
    inc si
    jmp greet
greeted:

    mov dx, SERIAL + 4
    mov al, 0x0b                        ; DTR, RTS, and OUT2: without it no interrupt leaves a PC's UART
    out dx, al
    mov dx, SERIAL + 1
    mov al, 1                           ; interrupt when data is ready
    out dx, al
wait_for_more:
    sti
    hlt
    jmp wait_for_more
